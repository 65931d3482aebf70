"""What transformers asks a mask function for, and what the attention function makes of the answer.

A mask of (B, 1, Lq, Lk) is built only where a pattern needs it. Otherwise `mask` answers with O(B L) memory, and the
answer says by itself what it means, because a module's `is_causal` is not always true:

    bool (B, n)             causal; True keys are real; n < Lk: the keys behind belong to nobody yet (a static cache)
    int (B, L)              causal inside each packed sequence; equal numbers are one sequence
    uint8 (B, Lk)           not causal, with the module's window; nonzero keys are real
    bool (B, 1, Lq|1, Lk)   everything, window and causality included
    None                    one row that sees all keys; from a module that asked for no mask, causal as the module says

Without padding the first, third and fourth are one number expanded. Where the model's file has attention with a softmax of
its own, which adds the mask to its scores, or takes the mask apart, the answer is eager's float mask.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..masks import Causal, Dense, Documents, Full, LoweredMask, Mask, Padding, SlidingWindow
from .transformers_sources import adds_masks, passes_window

REMEMBERED = 16

_lowered: dict[tuple[Any, ...], tuple[weakref.ref, LoweredMask]] = {}
_ones: dict[tuple[Any, torch.dtype], Tensor] = {}


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    config: Any = None,
    device: Any = "cpu",
    **others: Any,
) -> Tensor | None:
    """The mask function that transformers calls once a forward pass for every kind of layer; its arguments are theirs.

    Returns:
        One of the forms above.
    """
    padding = None if attention_mask is None else padded(attention_mask, kv_offset, kv_length)
    full: dict[str, Any] = dict(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap, device=device,
    )  # fmt: skip
    if adds_masks(config):
        from transformers.masking_utils import eager_mask

        dtype = others.get("dtype", torch.float32)
        return eager_mask(**full, dtype=dtype, allow_is_bidirectional_skip=allow_is_bidirectional_skip)
    tracing = torch.compiler.is_compiling()
    if not (allow_is_causal_skip or allow_is_bidirectional_skip) and not tracing:
        ids = None if use_vmap or padding is not None else packed_ids(mask_function)
        if ids is not None and ids.shape == (batch_size, q_length) and q_length == kv_length:
            return ids.to(device, torch.int32)
    windowed = local_size is not None and kv_length > local_size
    chunked = windowed and getattr(config, "attention_chunk_size", None) == local_size
    plain = allow_is_causal_skip or allow_is_bidirectional_skip
    if not plain or use_vmap or chunked or (windowed and not passes_window(config)):
        return whole(**full)
    if allow_is_bidirectional_skip:
        if padding is None or (not tracing and bool(padding.all())):
            padding = all_real(batch_size, kv_length, device, torch.uint8 if windowed and q_length > 1 else torch.bool)
        return padding.to(torch.uint8) if windowed and q_length > 1 else padding[:, None, None]
    if isinstance(q_offset, Tensor):
        if tracing:
            return whole(**full)
        q_offset = int(q_offset)
    seen = q_offset + q_length - kv_offset  # keys up to the last row's own
    if padding is not None and not tracing and bool(padding[:, :seen].all()):
        padding = None
    if q_length == 1 and seen == kv_length and padding is None:
        return None
    if q_length == 1 or seen > kv_length:
        return whole(**full)  # of one row it is no larger
    return all_real(batch_size, seen, device) if padding is None else padding[:, :seen]


def all_real(batch_size: int, n: int, device: Any, dtype: torch.dtype = torch.bool) -> Tensor:
    """No padding: (B, n) of one element, by which `is_all_real` knows it again."""
    if torch.compiler.is_compiling():
        return torch.ones((1, 1), dtype=dtype, device=device).expand(batch_size, n)
    key = (torch.device(device), dtype)
    if key not in _ones:
        with torch.inference_mode(False):
            _ones[key] = torch.ones((1, 1), dtype=dtype, device=device)
    return _ones[key].expand(batch_size, n)


def is_all_real(given: Tensor) -> bool:
    """Whether a mask came from `all_real`; a model may have sliced it."""
    if given.dtype not in (torch.bool, torch.uint8):
        return False
    if torch.compiler.is_compiling():
        return all(stride == 0 or n == 1 for stride, n in zip(given.stride(), given.shape))
    if type(given) is not Tensor or given.device.type == "meta":
        return False
    place = given.untyped_storage().data_ptr()
    return any(place == x.untyped_storage().data_ptr() for x in _ones.values())


def whole(**arguments: Any) -> Tensor:
    """The mask as a bool tensor (B, 1, Lq, Lk), by transformers' own function."""
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(allow_is_causal_skip=False, allow_is_bidirectional_skip=False, **arguments)


def padded(attention_mask: Tensor, kv_offset: int, kv_length: int) -> Tensor:
    """The part of a padding mask that the keys stand at; keys past its end are hidden. # bool (B, Lk)"""
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + kv_length].bool()


def packed_ids(mask_function: Any) -> Tensor | None:
    """The sequence numbers (B, L) of a mask function that is causal inside packed sequences and nothing else; else None."""
    atoms = _atoms(mask_function)
    ids = [x for name, x in atoms if name == "packed_sequence_mask_function"]
    known = {"packed_sequence_mask_function", "causal_mask_function", "sliding_window_overlay"}
    return ids[0] if len(ids) == 1 and {name for name, _ in atoms} <= known else None


def _atoms(fn: Any) -> list[tuple[str, Any]]:
    """(name of the factory, what it closed over) of the parts that a mask function of transformers is the `and` of."""
    if getattr(fn, "__module__", "") != "transformers.masking_utils":
        return [("unknown", None)]
    name = fn.__qualname__.split(".<locals>")[0]
    inside = [cell.cell_contents for cell in fn.__closure__ or ()]
    if name == "and_masks":
        return [atom for part in inside for f in part for atom in _atoms(f)]
    if name == "remap_positions_for_packed_sequence":  # distances inside a sequence do not change
        return [atom for f in inside if callable(f) for atom in _atoms(f)]
    return [(name, inside[0] if inside else None)]


def structure(
    given: Tensor | None, causal: bool, window: int | None, n_q: int, n_k: int, cu_q: Tensor | None, cu_k: Tensor | None
) -> tuple[Mask | LoweredMask | None, Tensor | None]:
    """(mask, additive bias) of a call, from what the mask function answered.

    Args:
        given: one of the forms above, or a float tensor (B, 1|H, Lq, Lk) that is added to the scores. Packed sequences are
            those of `cu_q` unless it says more than that there is no padding.
        causal, window: what the module says; they count as far as `given` leaves them open.
        n_q, n_k: rows and keys, the latter after those of nobody were cut off.
        cu_q, cu_k: cumulative lengths of packed sequences where the caller passed them.

    Raises:
        ValueError: a mask of another form.
    """
    if given is not None and given.dim() not in (2, 4):
        raise ValueError(f"attention_mask must be None or have 2 or 4 dimensions, got shape {tuple(given.shape)}")
    if given is not None and is_all_real(given):
        causal = given.dim() == 2 and given.dtype == torch.bool
        window = None if given.dim() == 4 else window  # of which it says everything
        given = None
    if given is not None and given.dim() == 4:
        given = given[..., :n_k] if given.shape[3] > n_k else given
        if given.dtype != torch.bool:
            return None, given
        if given.shape[1] != 1 or given.shape[2] != 1:
            return Dense(given), None
        keep = given[:, 0, 0]
        return _remembered(lambda: keys_kept(keep), given, n_q, n_k, None, None), None
    if given is not None:
        causal = given.dtype != torch.uint8
    shape = _shape(causal, window)
    if cu_q is not None and (given is None or given.dtype == torch.int32):
        return Documents(cu_seqlens=cu_q, cu_seqlens_k=cu_k, within=shape), None
    if given is None:
        return shape, None
    if given.dtype == torch.int32:
        return _remembered(lambda: Documents(ids=given, within=shape), given, n_q, n_k, causal, window), None
    return _remembered(lambda: keys_kept(given.bool()) & shape, given, n_q, n_k, causal, window), None


def _remembered(
    make: Callable[[], Mask], given: Tensor, n_q: int, n_k: int, causal: bool | None, window: int | None
) -> Mask | LoweredMask:
    """The mask that `make` makes of the tensor `given`, lowered once for all layers that share it."""
    if torch.compiler.is_compiling() or type(given) is not Tensor or given.is_inference():
        return make()
    key = (id(given), given._version, n_q, n_k, causal, window)
    found = _lowered.get(key)
    if found is not None and found[0]() is given:
        return found[1]
    lowered = make().lower(n_q, n_k, given.device)
    while len(_lowered) >= REMEMBERED:
        _lowered.pop(next(iter(_lowered)), None)
    _lowered[key] = (weakref.ref(given), lowered)
    return lowered


def _shape(causal: bool, window: int | None) -> Mask:
    """Causality and window, for rows that end where the keys end."""
    if window is None:
        return Causal("bottom_right") if causal else Full()
    return SlidingWindow(window - 1, 0 if causal else window - 1, "bottom_right")


def keys_kept(keep: Tensor) -> Mask:
    """A padding mask (B, Lk) as spans where it can be read without waiting and stands at one end; else as it is."""
    if keep.is_cpu and not torch.compiler.is_compiling() and type(keep) is Tensor:
        rises = keep[:, 1:] & ~keep[:, :-1]
        falls = keep[:, :-1] & ~keep[:, 1:]
        if not rises.any():
            return Padding(keep, "right")
        if not falls.any():
            return Padding(keep, "left")
    return Dense(keep[:, None, None])
