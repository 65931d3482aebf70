"""Backends: modules with the same verbs over a `Problem`.

    supports(p) -> None or the reason why not
    forward(p, train) -> (out, lse, out_lo)
    backward(p, do, dlse, out, lse, out_lo) -> Grads
    forward_jvp(p, tangents, out, lse, out_lo) -> (tout, tlse)
    forward_jvp2(p, three tangents, out, lse, out_lo, tlse_one, tlse_two) -> (tout, tlse), the second derivative
    backward_jvp(p, tangents, do, dlse, tdo, tdlse, out, lse, out_lo, tout, tlse) -> Grads, the tangents of `backward`'s

out has q's dtype and layout (`problem.empty_like_layout`); lse is contiguous in the accumulation dtype, natural log. With
`train` and fp16 or bf16, out_lo is what rounding took from out, in out's dtype and layout; otherwise it is empty, shape
(0,). Gradients have `problem.empty_rows`' layout. `reference` is not among them: it is plain PyTorch, differentiated by
autograd, and the oracle of the tests.
"""
