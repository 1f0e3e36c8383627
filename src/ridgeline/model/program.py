"""The step program: a model as an ordered tuple of typed operations on typed values.

A program is canonical: unfused and single-assignment. It refers to weights by name and never owns them.
An operation says how much arithmetic it is; bytes belong to its lowering, because a value that lives
inside one launch moves none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ridgeline.model.spec import Activation, NormSpec, RopeSpec
from ridgeline.types import Segment, SequenceRows, Step, StepWork, Work

Kind = Literal["tokens", "positions", "f32", "bf16", "A8-g32", "kv", "routes", "logits", "drawn"]


@dataclass(frozen=True, slots=True)
class Value:
    """The result of one operation: `width` numbers for each row, or for each wanted row if `selected`.

    Of what experts compute, a row has one result for each of its `experts`, in the order of their scores.
    """

    name: str
    kind: Kind
    width: int
    selected: bool = False
    experts: int = 1


@dataclass(frozen=True, slots=True)
class Weight:
    """A reference to a weight by its canonical name; `shape` is (out, in) or (width,), of experts
    (experts, out, in) or (experts, width)."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """Layers whose memory of a sequence grows with it and has one geometry: they share a pool's page ids and
    a table.

    "full" keeps every slot and "window" the last `window`. "latent" is for families whose memory is a
    compressed vector per slot.
    """

    kind: Literal["full", "window", "latent"]
    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class StateGroup:
    """Layers whose memory of a sequence is a state of fixed size, `width` float32 numbers in each layer.

    A slot of state has room for one sequence's in every layer of every such group, so that one id is enough.
    """

    layers: tuple[int, ...]
    width: int


@dataclass(frozen=True, slots=True)
class StepLoad:
    """How much of everything a step asks for: what operations need to know to count their arithmetic.

    For memory group g, `pairs[g]` counts the (row, visible slot) pairs and `slots[g]` the slots that any
    row of a sequence sees, summed over sequences; `output_pairs` and `output_slots` count those of the rows
    with outputs alone, and are None where these are all rows.
    """

    rows: int
    outputs: int
    pairs: tuple[int, ...]
    slots: tuple[int, ...]
    sequences: int = 1
    output_pairs: tuple[int, ...] | None = None
    output_slots: tuple[int, ...] | None = None

    @classmethod
    def of(cls, step: Step, groups: Sequence[MemoryGroup]) -> StepLoad:
        counts = [_visible(step.sequences, group.window) for group in groups]
        pairs, slots = zip(*counts, strict=True) if counts else ((), ())
        load = cls(step.rows, step.outputs, pairs, slots, len(step.sequences))
        if step.outputs == step.rows:
            return load
        counts = [_visible_to_outputs(step.sequences, group.window) for group in groups]
        pairs, slots = zip(*counts, strict=True) if counts else ((), ())
        return replace(load, output_pairs=pairs, output_slots=slots)

    @property
    def of_outputs(self) -> StepLoad:
        """The load of the rows with outputs alone."""
        pairs, slots = self.pairs, self.slots
        if not self.outputs:
            pairs = slots = (0,) * len(pairs)
        elif self.output_pairs is not None and self.output_slots is not None:
            pairs, slots = self.output_pairs, self.output_slots
        return StepLoad(self.outputs, self.outputs, pairs, slots, self.sequences)

    def times(self, count: int) -> StepLoad:
        """The load of a step that does this `count` times, for other sequences each."""
        seen = self.of_outputs
        counts = (self.pairs, self.slots, seen.pairs, seen.slots)
        pairs, slots, output_pairs, output_slots = (tuple(n * count for n in each) for each in counts)
        load = StepLoad(self.rows * count, self.outputs * count, pairs, slots, self.sequences * count)
        if self.outputs == self.rows:
            return load
        return replace(load, output_pairs=output_pairs, output_slots=output_slots)

    @property
    def without_outputs(self) -> StepLoad:
        """The load of a step with the same rows that wants no output."""
        return replace(self, outputs=0, output_pairs=None, output_slots=None)

    def __add__(self, other: StepLoad) -> StepLoad:
        """The load of a step that does both."""
        load = StepLoad(
            self.rows + other.rows,
            self.outputs + other.outputs,
            _sums(self.pairs, other.pairs),
            _sums(self.slots, other.slots),
            self.sequences + other.sequences,
        )
        if load.outputs == load.rows:
            return load
        mine, theirs = self.of_outputs, other.of_outputs
        pairs, slots = _sums(mine.pairs, theirs.pairs), _sums(mine.slots, theirs.slots)
        return replace(load, output_pairs=pairs, output_slots=slots)

    def rows_of(self, value: Value) -> int:
        return (self.outputs if value.selected else self.rows) * value.experts

    def experts_used(self, count: int, chosen: int) -> float:
        """The share of `count` experts that the rows are expected to use, if they choose evenly. There can be
        more: min(count, rows * chosen)."""
        return 1 - (1 - chosen / count) ** self.rows


def _visible(sequences: Sequence[SequenceRows], window: int | None) -> tuple[int, int]:
    """(row, slot) pairs and slots that the rows of sequences see through a window, in closed form."""
    pairs = slots = 0
    for sequence in sequences:
        own, rows = sequence.segments[-1], len(sequence.tokens)
        # Nearly all are like this, and every step counts them.
        if window is None and len(sequence.segments) == 1 and own.causal:
            slots += min(own.length, sequence.start + rows)
            pairs += rows * (sequence.start + 1)
            pairs += sum(sequence.depths) if sequence.parents else rows * (rows - 1) // 2
            continue
        first = own.first_position + sequence.start
        runs = [(first, first + rows - 1)]
        if sequence.parents:  # rows that stand side by side are counted one by one
            runs = [(first + depth, first + depth) for depth in sequence.depths]
        # Rows of a tree all see their own slots, wherever they stand.
        lasts = [max(last for _, last in runs)] * (len(sequence.segments) - 1) + [first + rows - 1]
        for segment, last in zip(sequence.segments, lasts, strict=True):
            pairs += sum(_pairs(segment, window, *run) for run in runs)
            slots += _slots(segment, window, first, last)
    return pairs, slots


def _visible_to_outputs(sequences: Sequence[SequenceRows], window: int | None) -> tuple[int, int]:
    """As `_visible`, of the rows with outputs alone. Slots between those that some of them see count too."""
    pairs = slots = 0
    for sequence in sequences:
        if not sequence.outputs:
            continue
        if len(sequence.outputs) == len(sequence.tokens):
            some_pairs, some_slots = _visible((sequence,), window)
            pairs += some_pairs
            slots += some_slots
            continue
        own = sequence.segments[-1]
        if window is None and len(sequence.segments) == len(sequence.outputs) == 1 and own.causal:
            seen = sequence.start + sequence.depths[sequence.outputs[0]] + 1
            pairs += seen
            slots += min(own.length, sequence.start + sequence.outputs[0] + 1)
            continue
        depths = sequence.depths
        places = [own.first_position + sequence.start + depths[row] for row in sequence.outputs]
        first, last = min(places), max(places)
        # Rows of a tree see slots of their own segment, wherever they stand.
        ends = [last] * (len(sequence.segments) - 1)
        ends.append(own.first_position + sequence.start + sequence.outputs[-1])
        for segment, end in zip(sequence.segments, ends, strict=True):
            pairs += sum(_pairs(segment, window, place, place) for place in places)
            slots += _slots(segment, window, first, end)
    return pairs, slots


def _slots(segment: Segment, window: int | None, first: int, last: int) -> int:
    """Slots of a segment that rows at positions first..last see."""
    begin, end = segment.first_position, segment.first_position + segment.length
    low = begin if window is None else max(begin, first - window + 1)
    return max(0, (min(end, last + 1) if segment.causal else end) - low)


def _sums(some: tuple[int, ...], others: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(sum, zip(some, others, strict=True)))


def _pairs(segment: Segment, window: int | None, first: int, last: int) -> int:
    """(row, slot) pairs that rows at positions first..last see of a segment."""
    begin, end = segment.first_position, segment.first_position + segment.length
    seen = _up_to_row(begin, first, last) - _up_to_row(end, first, last)
    if not segment.causal:
        seen = (last - first + 1) * segment.length
    if window is not None:
        seen -= _up_to_row(begin + window, first, last) - _up_to_row(end + window, first, last)
    return seen


def _up_to_row(begin: int, first: int, last: int) -> int:
    """Sum over rows p in first..last of the positions in begin..p."""
    low = max(first, begin)
    return (last - low + 1) * (low + last + 2 - 2 * begin) // 2 if last >= low else 0


# ------------------------------------------------------------------------------------- operations


@dataclass(frozen=True, slots=True)
class Operation:
    """Base of all operations. Fields of type Value other than `out` are inputs; of type Weight, weights."""

    out: Value

    @property
    def inputs(self) -> tuple[Value, ...]:
        return tuple(v for v in self._operands() if isinstance(v, Value))

    @property
    def weights(self) -> tuple[Weight, ...]:
        return tuple(v for v in self._operands() if isinstance(v, Weight))

    def _operands(self) -> list[object]:
        names: tuple[str, ...] = self.__match_args__  # a dataclass's fields, `out` first
        return [getattr(self, name) for name in names[1:]]

    def work(self, load: StepLoad) -> Work:
        """Arithmetic of this operation in a step; a transcendental function counts as one."""
        raise TypeError(f"{type(self).__name__} does not count its work")


def _work_in(kind: Kind, ops: int) -> Work:
    """Products with values of a kind run at that format's rate."""
    if kind == "A8-g32":
        return Work(int8_ops=ops)
    return Work(bf16_flops=ops) if kind == "bf16" else Work(fp32_flops=ops)


@dataclass(frozen=True, slots=True)
class Embed(Operation):
    """Row of a table for each token, or for each position, times `scale`."""

    ids: Value
    table: Weight
    scale: float = 1.0

    def work(self, load: StepLoad) -> Work:
        return Work(fp32_flops=load.rows_of(self.out) * self.out.width if self.scale != 1.0 else 0)


@dataclass(frozen=True, slots=True)
class Add(Operation):
    """Element-wise sum: the residual stream, or positions onto token embeddings."""

    x: Value
    y: Value

    def work(self, load: StepLoad) -> Work:
        return Work(fp32_flops=load.rows_of(self.out) * self.out.width)


@dataclass(frozen=True, slots=True)
class Norm(Operation):
    """Normalise over the width, or over each head of `head_dim` values where that is given.

    `weight` is then (head_dim,) for all heads, or (heads, head_dim).
    """

    x: Value
    spec: NormSpec
    weight: Weight
    bias: Weight | None = None
    head_dim: int | None = None

    @property
    def by_head(self) -> bool:
        """Whether each head has gains of its own."""
        return len(self.weight.shape) == 2

    def work(self, load: StepLoad) -> Work:
        per_value = 4 if self.spec.kind == "rms" else 7
        return Work(fp32_flops=per_value * load.rows_of(self.out) * self.out.width)


@dataclass(frozen=True, slots=True)
class Quantise(Operation):
    """Round float32 activations to A8-g32 or bfloat16 (`precision.quantise` has the exact rules)."""

    x: Value

    def work(self, load: StepLoad) -> Work:
        per_value = 4 if self.out.kind == "A8-g32" else 1
        return Work(fp32_flops=per_value * load.rows_of(self.out) * self.out.width)


@dataclass(frozen=True, slots=True)
class Linear(Operation):
    """W x + b."""

    x: Value
    weight: Weight
    bias: Weight | None = None

    def work(self, load: StepLoad) -> Work:
        ops = 2 * load.rows_of(self.x) * self.weight.shape[0] * self.weight.shape[1]
        return _work_in(self.x.kind, ops)


@dataclass(frozen=True, slots=True)
class Route(Operation):
    """Choose the experts of each row: the `chosen` largest softmax scores of router x + bias.

    `out` holds, for each row, the chosen experts in descending order of their scores, ties in ascending order
    of experts; their scores, divided by their sum where `renormalise`; and, with a `shared_gate` of shape
    (1, width), the sigmoid of its product with x. Everything is float32, whatever the weights' formats.
    """

    x: Value
    router: Weight
    chosen: int
    renormalise: bool
    bias: Weight | None = None
    shared_gate: Weight | None = None

    @property
    def count(self) -> int:
        """Experts to choose from."""
        return self.router.shape[0]

    def work(self, load: StepLoad) -> Work:
        products = self.count + (self.shared_gate is not None)
        return Work(fp32_flops=load.rows_of(self.x) * (2 * products * self.x.width + 3 * self.count))


@dataclass(frozen=True, slots=True)
class ExpertLinear(Operation):
    """W_e x + b_e for each expert e of a row's routes. Where x has as many results as a row has experts, each
    expert reads its own."""

    x: Value
    routes: Value
    weight: Weight
    bias: Weight | None = None

    @property
    def count(self) -> int:
        """Experts there are; a row has `out.experts` of them."""
        return self.weight.shape[0]

    def work(self, load: StepLoad) -> Work:
        ops = 2 * load.rows_of(self.out) * self.weight.shape[1] * self.weight.shape[2]
        return _work_in(self.x.kind, ops)


@dataclass(frozen=True, slots=True)
class Combine(Operation):
    """The sum of what a row's experts gave, each times its score, in the order of the routes; then of
    `shared` times the routes' last number where that is given."""

    x: Value
    routes: Value
    shared: Value | None = None

    def work(self, load: StepLoad) -> Work:
        terms = self.x.experts + (self.shared is not None)
        return Work(fp32_flops=2 * terms * load.rows_of(self.out) * self.out.width)


@dataclass(frozen=True, slots=True)
class Rope(Operation):
    """Turn the leading pairs of each head by the row's rotary position."""

    x: Value
    spec: RopeSpec
    head_dim: int

    def work(self, load: StepLoad) -> Work:
        return Work(fp32_flops=3 * load.rows_of(self.x) * (self.x.width // self.head_dim) * self.spec.dim)


@dataclass(frozen=True, slots=True)
class StoreKV(Operation):
    """Write keys and values into the rows' slots of a layer, rounded to the cache's format.

    Into latent memory go the rotary key that all heads share and, as the value, the latent vector.
    """

    key: Value
    value: Value
    layer: int
    group: int

    def work(self, load: StepLoad) -> Work:
        return Work()


@dataclass(frozen=True, slots=True)
class Attention(Operation):
    """Scaled dot-product attention over the stored keys and values, the row's own included.

    With `softcap`, a scaled score s becomes softcap * tanh(s / softcap) before a segment's bias is added.
    `sinks`, of shape (heads,), are scores that take part in each head's softmax and have no value.

    From latent memory, `expand`, of shape (heads * (what of a key does not turn + value_dim), rank), makes
    each head's keys and values, of which the latter have `value_dim` numbers. An executor may move that
    product to queries and results. Its arithmetic is counted once a row, which is the least of either way.
    """

    query: Value
    memory: Value
    layer: int
    group: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Weight | None = None
    value_dim: int | None = None
    expand: Weight | None = None

    def work(self, load: StepLoad) -> Work:
        pairs = self.heads * load.pairs[self.group]
        per_score = 3 if self.softcap is None else 6
        products = 2 * (self.head_dim + (self.value_dim or self.head_dim)) * pairs
        if self.expand is not None:
            products += 2 * load.rows_of(self.out) * self.expand.shape[0] * self.expand.shape[1]
        return _work_in(self.query.kind, products) + Work(fp32_flops=per_score * pairs)


@dataclass(frozen=True, slots=True)
class GatedRecurrence(Operation):
    """h ← f h + (1 − f) x with f = sigmoid(gate), value by value, row after row of a sequence; the result of
    a row is the h behind it.

    h is the layer's state in a group of `Program.states`: a sequence's rows go on from the one that the step
    names, and leave the one behind the last. It is rounded to float32 in every row, so that it does not
    matter how rows are spread over steps. This is the recurrence of Qin et al., "Hierarchically Gated
    Recurrent Neural Network for Sequence Modeling" (NeurIPS 2023, arXiv:2311.04823), in real numbers; that
    of minGRU (arXiv:2410.01201) has the gate's other sign.
    """

    x: Value
    gate: Value
    layer: int
    group: int

    def work(self, load: StepLoad) -> Work:
        return Work(fp32_flops=5 * load.rows_of(self.out) * self.out.width)


@dataclass(frozen=True, slots=True)
class Activate(Operation):
    """act(x), times `times` where that is given (`spec.Activation` has the exception)."""

    x: Value
    activation: Activation
    times: Value | None = None

    def work(self, load: StepLoad) -> Work:
        return Work(fp32_flops=(4 if self.times is None else 5) * load.rows_of(self.out) * self.out.width)


@dataclass(frozen=True, slots=True)
class Select(Operation):
    """Keep the rows whose output the step wants."""

    x: Value

    def work(self, load: StepLoad) -> Work:
        return Work()


@dataclass(frozen=True, slots=True)
class Softcap(Operation):
    """cap * tanh(x / cap)."""

    x: Value
    cap: float

    def work(self, load: StepLoad) -> Work:
        return Work(fp32_flops=3 * load.rows_of(self.out) * self.out.width)


@dataclass(frozen=True, slots=True)
class Sample(Operation):
    """Draw a token from the logits of each output for which the step says how (`execution.draw`).

    The work is that of one comparison per logit; filters and noise depend on the request.
    """

    logits: Value

    def work(self, load: StepLoad) -> Work:
        return Work(fp32_flops=load.rows_of(self.logits) * self.logits.width)


@dataclass(frozen=True, slots=True)
class Program:
    """An ordered, single-assignment list of operations. `output` is the logits, or of an encoder the final
    hidden states (kind "f32", of the wanted rows); a value of kind "drawn" is read by the host too. Layers
    that attend have their memory in `groups`, recurrent ones in `states`."""

    name: str
    operations: tuple[Operation, ...]
    groups: tuple[MemoryGroup, ...]
    output: Value
    states: tuple[StateGroup, ...] = ()

    def __post_init__(self) -> None:
        known: set[str] = {"tokens", "positions"}
        for op in self.operations:
            missing = [v.name for v in op.inputs if v.name not in known]
            if missing or op.out.name in known:
                raise ValueError(
                    f"{type(op).__name__} {op.out.name}: reads {missing} before, or assigns twice"
                )
            known.add(op.out.name)

    def leaves(self, value: Value) -> bool:
        """Whether the host reads a value."""
        return value.name == self.output.name or value.kind == "drawn"

    def weights(self) -> Iterator[Weight]:
        """Every weight that the program reads, once, in order of first use."""
        seen: set[str] = set()
        for op in self.operations:
            for weight in op.weights:
                if weight.name not in seen:
                    seen.add(weight.name)
                    yield weight

    def work(self, load: StepLoad) -> Work:
        """Arithmetic of the whole program in a step."""
        return Work.total(op.work(load) for op in self.operations)

    def parts(self, load: StepLoad) -> StepWork:
        """The same as the work of a step in which every operation is a launch that moves no bytes."""
        attending = [op for op in self.operations if isinstance(op, Attention)]
        attention = Work.total([Work(), *(op.work(load) for op in attending)])
        dense = self.work(load) - attention
        return StepWork(dense, attention, load.rows, load.outputs, load.sequences, len(self.operations))
