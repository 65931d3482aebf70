"""Every private torch name that the library uses, each with what happens where it is gone. Nothing else imports one.

Run on torch 2.11 and 2.13. Where a name is missing the fallback beside it is used, so that what comes after can differ.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_BASE = torch.autograd.Function
_forward_ad = torch.autograd.forward_ad

# Whether any functorch transform (vmap, grad, jvp) is active.
in_functorch: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)

# Lets an autograd.Function run inside an operator's Autograd kernel while functorch transforms are active.
try:
    from torch._functorch.autograd_function import enable_single_level_autograd_function as _single_level
except ImportError:  # pragma: no cover
    _single_level = contextlib.nullcontext  # type: ignore[assignment]

# Switches forward-mode tracking, which an enclosing transform may have turned off.
_set_forward_grad: Callable[[bool], Any] = getattr(
    torch.autograd.forward_ad, "_set_fwd_grad_enabled", lambda mode: contextlib.nullcontext()
)

# Whether forward-mode tracking is on; without the answer, an open dual level counts as tracking.
_forward_grad_enabled: Callable[[], bool] = getattr(torch._C, "_is_fwd_grad_enabled", lambda: True)

# Skips the Autograd keys. No fallback: torch.library's own Autograd kernels stand on the same guard.
_below_autograd: Callable[[], Any] = torch._C._AutoDispatchBelowAutograd

# Skips a set of dispatch keys. No fallback: torch.library's own autocast kernels stand on the same guard.
_exclude_keys: Callable[[Any], Any] = torch._C._ExcludeDispatchKeyGuard
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


# torch's fused attention on the CPU; its Python binding costs the host less than the operator object.
fused_cpu_forward: Callable[..., Any] = getattr(
    torch, "_scaled_dot_product_flash_attention_for_cpu", torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
)


# The autograd node whose backward, or hooks before or behind it, is running. Without it the tiniest calls use a Function.
running_node: Callable[[], Any] | None = getattr(torch._C, "_current_autograd_node", None)


class _Hooks(dict):  # type: ignore[type-arg]
    """What torch keeps a tensor's hooks in, cheaper to make than its OrderedDict; handles refer to it weakly."""

    __slots__ = ("__weakref__",)


def watch_gradient(out: torch.Tensor, hook: Callable[[torch.Tensor], None]) -> None:
    """Call hook(gradient of out) in a backward; it may ask for the `running_node`. Makes no handle, which takes longer."""
    out._backward_hooks = _Hooks({-1: hook})  # handles count from 0
    out.grad_fn._register_hook_dict(out)  # type: ignore[union-attr]


_saving_hooks: Callable[[bool], Any] | None = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def saving_is_watched() -> bool:
    """Whether what a node saves goes through hooks, as in a checkpoint, which lets it be read once; where torch does not say,
    yes: the slower answer is always right."""
    return _saving_hooks is None or _saving_hooks(True) is not None


def saved_by_fused_cpu_forward(node: Any) -> tuple[Any, ...]:
    """Its (q, k, v, attn_mask, is_causal, scale) and its (out, lse), these two without a graph, as the node has kept them."""
    out, lse = node._saved_output.detach(), node._saved_logsumexp.detach()
    return (
        node._saved_query, node._saved_key, node._saved_value, node._saved_attn_mask, node._saved_is_causal, node._saved_scale,
        out, lse,
    )  # fmt: skip


def in_dual_level() -> bool:
    """Whether a forward_ad.dual_level is open; where torch does not say, yes: the slower answer is always right."""
    return getattr(_forward_ad, "_current_level", 0) >= 0


def in_forward_mode() -> bool:
    """Whether tangents are being tracked: a dual level is open and not switched off."""
    return in_dual_level() and _forward_grad_enabled()


def primal(x: Any) -> Any:
    """x without its tangent, for arguments whose tangents are arguments of their own; functorch strips them itself."""
    if not isinstance(x, torch.Tensor) or in_functorch() or not in_dual_level():
        return x
    return torch.autograd.forward_ad.unpack_dual(x).primal


def apply(cls: type[torch.autograd.Function], *args: Any) -> Any:
    """cls.apply(*args), without binding the signature on every call (tens of microseconds for a setup_context Function)."""
    if in_functorch():
        with _single_level():
            return super(_BASE, cls).apply(*args)  # type: ignore[misc]
    return super(_BASE, cls).apply(*args)  # type: ignore[misc]


def redispatch(op: Any, *args: Any) -> Any:
    """Call an operator's kernel below the Autograd key: from inside a Function, or where nothing needs a gradient.

    Under functorch the operator may meet an enclosing level's tensors; without grad mode switched on for them the gradient
    of a gradient would silently be zero.
    """
    if in_functorch():
        with torch.enable_grad(), _set_forward_grad(True), _below_autograd():
            return op(*args)
    with _below_autograd():
        return op(*args)


def without_autocast(op: Any, *args: Any) -> Any:
    """Call an operator with autocast off, so that no product inside its kernel is silently rounded."""
    with _exclude_keys(_AUTOCAST):
        return op(*args)


def base_apply(cls: type[torch.autograd.Function], *args: Any) -> Any:
    """`apply` where no functorch transform is active."""
    return super(_BASE, cls).apply(*args)  # type: ignore[misc]


_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 1)
_any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def nothing_watches() -> bool:
    """Whether plain tensors are all there is: no transform, mode, compiler, autocast or forward-mode level."""
    return not (
        torch.compiler.is_compiling()
        or in_functorch()
        or _any_autocast()
        or _dispatch_modes()
        or _function_modes()
        or in_dual_level()
    )


def constant_in_graphs(fn: Any) -> Any:
    """Decorator: what torch.compile meets of fn is its result. As torch.compiler.assume_constant_result, which however
    imports the compiler, doubling the time that `import fastattn` takes."""
    fn._dynamo_marked_constant = True
    return fn


def causal_bias_alignment(mask: Any) -> str | None:
    """Which corner torch's CausalBias stands at: "top_left" or "bottom_right"; None for anything else.

    Whoever holds one has loaded its module; loading it here would load the compiler too.
    """
    if mask is None or type(mask) is torch.Tensor:
        return None
    module = sys.modules.get("torch.nn.attention.bias")
    if module is None or not isinstance(mask, module.CausalBias):
        return None
    return "top_left" if mask.variant == module.CausalVariant.UPPER_LEFT else "bottom_right"


# Reads and writes the dispatch keys that this thread leaves out.
_is_left_out: Callable[[Any], bool] | None = getattr(torch._C, "_dispatch_tls_is_dispatch_key_excluded", None)
_leave_out: Callable[[Any, bool], None] | None = getattr(torch._C, "_dispatch_tls_set_dispatch_key_excluded", None)
_AUTOGRAD = [
    getattr(torch._C.DispatchKey, name)
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor")
    if hasattr(torch._C.DispatchKey, name)
]


@contextlib.contextmanager
def autograd_inside_operators() -> Iterator[None]:
    """Autograd works on what is made inside, also below the Autograd keys, in an operator's own kernel.

    Raises:
        NotImplementedError: this torch has no way to say so.
    """
    if _is_left_out is None or _leave_out is None or not _AUTOGRAD:
        raise NotImplementedError("this version of torch cannot differentiate inside an operator")
    before = [_is_left_out(key) for key in _AUTOGRAD]
    for key in _AUTOGRAD:
        _leave_out(key, False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for key, was in zip(_AUTOGRAD, before):
            _leave_out(key, was)


# Batched gradients (torch.autograd.grad(is_grads_batched=True), functional.jacobian(vectorize=True)) run on vmap's
# predecessor, whose tensors an operator with lists meets at the Batched key. Without these names they raise, as in torch.
_enter_level: Callable[[], int] | None = getattr(torch._C, "_vmapmode_increment_nesting", None)
_leave_level: Callable[[], int] | None = getattr(torch._C, "_vmapmode_decrement_nesting", None)
_add_dim: Callable[..., torch.Tensor] | None = getattr(torch, "_add_batch_dim", None)
_remove_dim: Callable[..., torch.Tensor] | None = getattr(torch, "_remove_batch_dim", None)
HAS_BATCHED_GRADIENTS = None not in (_enter_level, _leave_level, _add_dim, _remove_dim)


def batched_gradients(op: Any, *args: Any) -> Any:
    """An operator on the tensors of a batched gradient: unwrap the innermost level and let torch.vmap map the operator."""
    assert _enter_level is not None
    assert _leave_level is not None
    assert _add_dim is not None
    level = _leave_level() + 1
    try:
        leaves, structure = tree_flatten(args)
        pairs = [_unwrap(x, level) for x in leaves]
        mapped = [i for i, (_, is_mapped) in enumerate(pairs) if is_mapped]
        values = [x for x, _ in pairs]
        if not mapped:
            return op(*args)

        def one(*sample: torch.Tensor) -> Any:
            inner = list(values)
            for i, x in zip(mapped, sample, strict=True):
                inner[i] = x
            return op(*tree_unflatten(inner, structure))

        result = torch.vmap(one)(*(values[i] for i in mapped))
        return tree_map(lambda x: _add_dim(x, 0, level), result)
    finally:
        _enter_level()


def _unwrap(x: Any, level: int) -> tuple[Any, bool]:
    """(x with its mapped dimension in front, True), or (x, False) where `level` does not map it."""
    if not isinstance(x, torch.Tensor):
        return x, False
    assert _remove_dim is not None
    one, two = (_remove_dim(x, level, size, 0) for size in (1, 2))  # an unmapped tensor takes the size it is told
    return (one, True) if one.shape[0] == two.shape[0] else (x, False)


# The kernel that runs for an operator and a dispatch key; without it torch's plain attention stands in for the original.
_get_kernel: Callable[..., Any] | None = getattr(torch.library, "get_kernel", None)
_SDPA = "scaled_dot_product_attention"
_SDPA_KEYS = ("CompositeImplicitAutograd", "FuncTorchVmapMode")  # vmap has a kernel of its own, which decomposes the call


def override_sdpa(attend: Callable[..., torch.Tensor]) -> Callable[[], None]:
    """Put `attend(original, ...)` under torch's scaled_dot_product_attention; returns what takes it away again.

    `original` computes what torch computed before. The composite operator is what every route comes to: names bound
    early, autograd, inference mode, autocast and the compiler.
    """
    library = torch.library.Library("aten", "IMPL")
    for key in _SDPA_KEYS:
        original = _original_sdpa("CPU" if key == "CompositeImplicitAutograd" else key)
        with warnings.catch_warnings():  # torch warns of every operator that is overridden
            warnings.simplefilter("ignore")
            library.impl(_SDPA, _with_original(attend, original), key, with_keyset=True)
    return lambda: _forget(library)


def _with_original(attend: Callable[..., torch.Tensor], original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def kernel(keys: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return attend(lambda: original(keys, *args, **kwargs), *args, **kwargs)

    return kernel


def _original_sdpa(key: str) -> Callable[..., torch.Tensor]:
    """What torch registered at a dispatch key, as a function of (dispatch keys, the operator's arguments)."""
    if _get_kernel is not None:
        return _get_kernel(f"aten::{_SDPA}", key).call_boxed
    return _plain_sdpa  # pragma: no cover


def _plain_sdpa(keys: Any, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False):
    plain = torch.ops.aten._scaled_dot_product_attention_math
    return plain(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]


def _forget(library: torch.library.Library) -> None:
    """Take a library's kernels out of the dispatcher now, not when it is collected."""
    destroy = getattr(library, "_destroy", None)
    if destroy is not None:
        destroy()


def implement(kernels: dict[str, Callable[..., Any]], device: str) -> Callable[[], None]:
    """Put kernels under operators of aten for tensors on `device`; those that this torch has. Returns the way back."""
    library = torch.library.Library("aten", "IMPL")
    for name, kernel in kernels.items():
        if hasattr(torch.ops.aten, name):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                library.impl(name, kernel, device)
    return lambda: _forget(library)


def replace_jagged_sdpa(attend: Callable[..., torch.Tensor]) -> Callable[[], None]:
    """Put `attend(original, ...)` in the place where jagged nested tensors look their attention up; returns the way back.

    They never reach the operator. Where the place is gone they stay with torch's.
    """
    try:
        from torch.nested._internal import ops
    except ImportError:  # pragma: no cover
        return lambda: None
    name = f"jagged_{_SDPA}"
    original = getattr(ops, name, None)
    if original is None:  # pragma: no cover
        return lambda: None

    def jagged(*args: Any, **kwargs: Any) -> torch.Tensor:
        return attend(lambda: original(*args, **kwargs), *args, **kwargs)

    setattr(ops, name, jagged)

    def back() -> None:
        if getattr(ops, name, None) is jagged:
            setattr(ops, name, original)

    return back


def jagged(rows: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The jagged nested tensor of packed rows, by torch's public function.

    That refuses in the graph that comes of tracing, where an operator's kernel may stand; what it calls works there.
    """
    if torch.compiler.is_dynamo_compiling():
        return torch.nested.nested_tensor_from_jagged(rows, offsets)
    try:
        return torch.nested.nested_tensor_from_jagged(rows, offsets)
    except RuntimeError:
        from torch.nested._internal.nested_tensor import nested_view_from_values_offsets

        return nested_view_from_values_offsets(rows, offsets)


def forget_compiled() -> None:
    """Compile anew what was compiled: the compiler does not see that an operator's kernel was exchanged."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
