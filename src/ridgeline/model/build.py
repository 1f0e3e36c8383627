"""From a ModelSpec to its programs, in canonical form: unfused, float32 activations."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from ridgeline.model.program import (
    Activate,
    Add,
    Attention,
    Combine,
    Embed,
    ExpertLinear,
    Kind,
    Linear,
    MemoryGroup,
    Norm,
    Operation,
    Program,
    Rope,
    Route,
    Sample,
    Select,
    Softcap,
    StoreKV,
    Value,
    Weight,
)
from ridgeline.model.spec import (
    AttentionSpec,
    ExpertsSpec,
    FeedForwardSpec,
    LayerSpec,
    ModelSpec,
    NormSpec,
)

Op = TypeVar("Op", bound=Operation)


@dataclass(slots=True)
class _Builder:
    """Collects operations; every method appends one and returns its value."""

    spec: ModelSpec
    operations: list[Operation] = field(default_factory=list)

    def append(self, operation: Operation) -> Value:
        self.operations.append(operation)
        return operation.out

    def value(self, name: str, width: int, kind: Kind = "f32", selected: bool = False) -> Value:
        return Value(name, kind, width, selected)

    def norm(self, x: Value, name: str) -> Value:
        spec = self.spec.norm
        bias = Weight(f"{name}.bias", (x.width,)) if spec.has_bias else None
        return self.append(Norm(replace(x, name=name), x, spec, Weight(name, (x.width,)), bias))

    def qk_norm(self, x: Value, name: str, of: AttentionSpec) -> Value:
        if of.qk_norm_whole:
            return self.norm(x, name)
        spec = NormSpec(of.qk_norm_kind, self.spec.norm.eps, bias=False)
        each = (of.head_dim,)
        gains = Weight(name, (x.width // of.head_dim, *each) if of.qk_norm_by_head else each)
        return self.append(Norm(replace(x, name=name), x, spec, gains, head_dim=of.head_dim))

    def linear(self, x: Value, name: str, width: int, bias: bool = False) -> Value:
        kernel = Weight(name, (width, x.width))
        offset = Weight(f"{name}.bias", (width,)) if bias else None
        return self.append(Linear(replace(x, name=name, width=width), x, kernel, offset))

    def add(self, x: Value, y: Value, name: str) -> Value:
        return self.append(Add(replace(x, name=name), x, y))


def memory_groups(spec: ModelSpec) -> tuple[MemoryGroup, ...]:
    """Group the layers by the geometry of their sequence memory, in order of first appearance."""
    layers: dict[MemoryGroup, list[int]] = {}
    for index, layer in enumerate(spec.layers):
        layers.setdefault(_geometry(layer.attention), []).append(index)
    return tuple(replace(group, layers=tuple(indices)) for group, indices in layers.items())


def _geometry(attention: AttentionSpec) -> MemoryGroup:
    """The group of a layer, without layers. Latent memory is one vector a slot, for all heads."""
    latent, window = attention.latent, attention.window
    if latent is not None:
        return MemoryGroup("latent", (), 1, latent.rank + latent.rope_dim)
    kind: Literal["full", "window"] = "full" if window is None else "window"
    return MemoryGroup(kind, (), attention.kv_heads, attention.head_dim, window)


def decoder(spec: ModelSpec) -> Program:
    """The program that turns tokens and positions into logits, over the memory of all layers."""
    build = _Builder(spec)
    groups = memory_groups(spec)
    final = _final_states(build, groups)
    head = Weight("embed" if spec.tied_head else "head", (spec.vocabulary, spec.hidden))
    logits = build.append(Linear(Value("head", "logits", spec.vocabulary, selected=True), final, head))
    if spec.logit_softcap is not None:
        logits = build.append(Softcap(replace(logits, name="logits"), logits, spec.logit_softcap))
    build.append(Sample(Value("drawn", "drawn", 1, selected=True), logits))
    return Program("decoder", tuple(build.operations), groups, logits)


def encoder(spec: ModelSpec) -> Program:
    """The decoder up to its final norm, whose values are the output. It shares weights and memory with it."""
    build = _Builder(spec)
    groups = memory_groups(spec)
    final = _final_states(build, groups)
    return Program("encoder", tuple(build.operations), groups, final)


def _final_states(build: _Builder, groups: tuple[MemoryGroup, ...]) -> Value:
    """The normalised stream behind the last layer, of the rows that are wanted."""
    spec = build.spec
    group_of = {layer: g for g, group in enumerate(groups) for layer in group.layers}
    stream = _embed(build)
    for index, layer in enumerate(spec.layers):
        stream = _layer(build, stream, layer, index, group_of[index])
    selected = build.append(Select(Value("selected", "f32", spec.hidden, selected=True), stream))
    return build.norm(selected, "final_norm")


def _embed(build: _Builder) -> Value:
    spec = build.spec
    table = Weight("embed", (spec.vocabulary, spec.hidden))
    tokens = build.value("tokens", 1, "tokens")
    stream = build.append(Embed(build.value("embed", spec.hidden), tokens, table, spec.embedding_scale))
    if spec.learned_positions is None:
        return stream
    table = Weight("positions", (spec.learned_positions, spec.hidden))
    where = build.value("positions", 1, "positions")
    offsets = build.append(Embed(build.value("position_embed", spec.hidden), where, table))
    return build.add(stream, offsets, "embed_sum")


def _layer(build: _Builder, stream: Value, layer: LayerSpec, index: int, group: int) -> Value:
    prefix = f"layers.{index}"

    def normed(x: Value, name: str, wanted: bool) -> Value:
        return build.norm(x, f"{prefix}.{name}_norm") if wanted else x

    x = normed(stream, "attention", layer.pre_norms)
    if layer.parallel:
        beside = x if layer.one_norm else normed(stream, "feed_forward", layer.pre_norms)
    attend = _attention if layer.attention.latent is None else _latent_attention
    x = attend(build, x, layer.attention, index, group)
    x = normed(x, "post_attention", layer.post_norms)
    stream = build.add(stream, x, f"{prefix}.attention_sum")
    x = beside if layer.parallel else normed(stream, "feed_forward", layer.pre_norms)
    if isinstance(layer.feed_forward, ExpertsSpec):
        x = _experts(build, x, layer.feed_forward, prefix)
    else:
        x = _feed_forward(build, x, layer.feed_forward, prefix)
    x = normed(x, "post_feed_forward", layer.post_norms)
    return build.add(stream, x, f"{prefix}.feed_forward_sum")


def _attention(build: _Builder, x: Value, spec: AttentionSpec, index: int, group: int) -> Value:
    prefix = f"layers.{index}"
    dim = spec.head_dim
    query = build.linear(x, f"{prefix}.q", spec.heads * dim, spec.qkv_bias)
    key = build.linear(x, f"{prefix}.k", spec.kv_heads * dim, spec.qkv_bias)
    value = build.linear(x, f"{prefix}.v", spec.kv_heads * dim, spec.qkv_bias)
    if spec.qk_norm:
        query = build.qk_norm(query, f"{prefix}.q_norm", spec)
        key = build.qk_norm(key, f"{prefix}.k_norm", spec)
    if spec.rope is not None:
        query = build.append(Rope(replace(query, name=f"{prefix}.q_rope"), query, spec.rope, dim))
        key = build.append(Rope(replace(key, name=f"{prefix}.k_rope"), key, spec.rope, dim))
    memory = build.append(StoreKV(Value(f"{prefix}.kv", "kv", 2 * key.width), key, value, index, group))
    mixed = build.append(
        Attention(
            replace(query, name=f"{prefix}.attention"),
            query,
            memory,
            index,
            group,
            spec.heads,
            spec.kv_heads,
            dim,
            spec.scale,
            spec.window,
            spec.softcap,
            Weight(f"{prefix}.sinks", (spec.heads,)) if spec.sinks else None,
        )
    )
    return build.linear(mixed, f"{prefix}.o", build.spec.hidden, spec.output_bias)


def _latent_attention(build: _Builder, x: Value, spec: AttentionSpec, index: int, group: int) -> Value:
    prefix, latent, rope = f"layers.{index}", spec.latent, spec.rope
    assert latent is not None
    assert rope is not None
    source = x
    if latent.query_rank is not None:
        source = build.linear(x, f"{prefix}.q_a", latent.query_rank)
        source = build.norm(source, f"{prefix}.q_a_norm")
    query = build.linear(source, f"{prefix}.q", spec.heads * spec.head_dim)
    vector = build.norm(build.linear(x, f"{prefix}.kv_a", latent.rank), f"{prefix}.kv_a_norm")
    key = build.linear(x, f"{prefix}.k", latent.rope_dim)
    query = build.append(Rope(replace(query, name=f"{prefix}.q_rope"), query, rope, spec.head_dim))
    key = build.append(Rope(replace(key, name=f"{prefix}.k_rope"), key, rope, latent.rope_dim))
    kept = Value(f"{prefix}.kv", "kv", key.width + vector.width)
    memory = build.append(StoreKV(kept, key, vector, index, group))
    each = spec.head_dim - latent.rope_dim + latent.value_dim
    mixed = build.append(
        Attention(
            replace(query, name=f"{prefix}.attention", width=spec.heads * latent.value_dim),
            query,
            memory,
            index,
            group,
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            spec.scale,
            value_dim=latent.value_dim,
            expand=Weight(f"{prefix}.kv_b", (spec.heads * each, latent.rank)),
        )
    )
    return build.linear(mixed, f"{prefix}.o", build.spec.hidden, spec.output_bias)


def _feed_forward(build: _Builder, x: Value, spec: FeedForwardSpec, prefix: str) -> Value:
    up = build.linear(x, f"{prefix}.up", spec.width, spec.bias)
    source, times = up, None
    if spec.gated:
        source, times = build.linear(x, f"{prefix}.gate", spec.width, spec.bias), up
    name = f"{prefix}.activation"
    mixed = build.append(Activate(replace(up, name=name), source, spec.activation, times))
    return build.linear(mixed, f"{prefix}.down", build.spec.hidden, spec.bias)


def _experts(build: _Builder, x: Value, spec: ExpertsSpec, prefix: str) -> Value:
    """The experts' weights are named as those of a feed-forward, with `experts.` before."""
    gated = spec.shared is not None and spec.shared_gate
    shared_gate = Weight(f"{prefix}.shared_gate", (1, x.width)) if gated else None
    routes = build.append(
        Route(
            Value(f"{prefix}.routes", "routes", 2 * spec.chosen + (shared_gate is not None)),
            x,
            Weight(f"{prefix}.router", (spec.count, x.width)),
            spec.chosen,
            spec.renormalise,
            Weight(f"{prefix}.router.bias", (spec.count,)) if spec.router_bias else None,
            shared_gate,
        )
    )

    def each(x: Value, part: str, width: int) -> Value:
        name = f"{prefix}.experts.{part}"
        bias = Weight(f"{name}.bias", (spec.count, width)) if spec.expert.bias else None
        weight = Weight(name, (spec.count, width, x.width))
        out = Value(name, "f32", width, experts=spec.chosen)
        return build.append(ExpertLinear(out, x, routes, weight, bias))

    gate, up = each(x, "gate", spec.expert.width), each(x, "up", spec.expert.width)
    name = f"{prefix}.experts.activation"
    mixed = build.append(Activate(replace(up, name=name), gate, spec.expert.activation, up))
    down = each(mixed, "down", build.spec.hidden)
    shared = _feed_forward(build, x, spec.shared, f"{prefix}.shared") if spec.shared else None
    return build.append(Combine(replace(x, name=f"{prefix}.experts"), down, routes, shared))
