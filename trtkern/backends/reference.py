"""The reference backend: ``trtkern.reference``, in any floating dtype, on any device, differentiable twice."""

from __future__ import annotations

from trtkern import reference
from trtkern.backends.base import Backend

BACKEND = Backend(
    name="reference",
    missing=lambda: None,
    refuses=lambda case: None if case.dtype.is_floating_point else f"dtype {case.dtype} is not floating point",
    ops={
        "lif": reference.lif,
        "batch_norm_lif": reference.batch_norm,
        "delay": reference.delay,
        "recurrent": reference.recurrent,
        "regularizer": reference.regularizer,
        "spike_conv_forward": reference.spike_conv,
        "spike_conv_weight_grad": reference.spike_conv_weight_grad,
        "spike_conv_input_grad": reference.spike_conv_input_grad,
        "spikes_pack": reference.spikes_pack,
        "spikes_unpack": reference.spikes_unpack,
    },
)
