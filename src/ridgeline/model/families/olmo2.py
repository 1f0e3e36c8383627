"""OLMo 2: norms after each half only, and Q and K normalised over all heads together."""

from __future__ import annotations

from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.families.decoder import (
    IGNORED,
    NAMES,
    POST_NORMS,
    QK_NORMS,
    Traits,
    refuse_window_of_gguf,
    spec_from_config,
    spec_from_gguf,
)
from ridgeline.model.families.family import Family
from ridgeline.model.spec import ModelSpec

_TRAITS = Traits(
    "olmo2", eps=1e-5, context=2048, qk_norm=True, qk_norm_whole=True, pre_norms=False, post_norms=True
)


def from_gguf(checkpoint: Checkpoint) -> ModelSpec:
    """Files of this architecture with a window are OLMo 3's."""
    return refuse_window_of_gguf(checkpoint, spec_from_gguf(checkpoint, _TRAITS, "olmo2"), "olmo2")


def from_config(checkpoint: Checkpoint) -> ModelSpec:
    return spec_from_config(checkpoint, _TRAITS)


OLMO2 = Family(
    name="olmo2",
    architectures=("olmo2",),
    model_types=("olmo2",),
    from_gguf=from_gguf,
    from_config=from_config,
    names={**NAMES, **QK_NORMS, **POST_NORMS},
    ignored=IGNORED,
)
