"""What every lowering needs to know to fuse: who makes a value, and who reads it.

An executor's lowering derives from `Fusion` and gives a rule for each kind of operation that may come first
in a launch. A rule looks ahead, and takes along what nobody else reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from ridgeline.execution.lowering import Launch, check_lowering
from ridgeline.model.program import Attention, Norm, Operation, Program, Quantise, Rope, StoreKV, Value
from ridgeline.model.spec import RopeSpec

L = TypeVar("L", bound=Launch)


class Fusion(Generic[L]):
    """One pass over a program's operations, in order; `done` holds those that a launch covers already."""

    executor: ClassVar[str]
    rules: ClassVar[Mapping[type[Operation], Callable[[Any, Any], Launch]]]

    def __init__(self, program: Program) -> None:
        self.program = program
        self.producer = {op.out.name: op for op in program.operations}
        self.users: dict[str, list[Operation]] = {}
        for op in program.operations:
            for value in op.inputs:
                self.users.setdefault(value.name, []).append(op)
        self.done: set[int] = set()

    def lower(self) -> tuple[L, ...]:
        """The program's launches in order; checked to cover it exactly."""
        made: list[Any] = []
        for op in self.program.operations:
            if id(op) in self.done or self._joins_store(op):
                continue
            launch = self.rules[type(op)](self, op)
            self.done.update(id(covered) for covered in launch.covers)
            made.append(launch)
        launches = tuple(made)
        check_lowering(self.program, launches)
        return launches

    # -- who reads a value

    def only_user(self, value: Value) -> Operation | None:
        users = self.users.get(value.name, [])
        return users[0] if len(users) == 1 and not self.program.leaves(value) else None

    def then_quantise(self, value: Value, *kinds: str) -> tuple[tuple[Operation, ...], Value]:
        """The `Quantise` (to one of `kinds`, or any) that alone reads `value`, if there is one, and the
        value that then leaves."""
        user = self.only_user(value)
        if isinstance(user, Quantise) and (not kinds or user.out.kind in kinds):
            return (user,), user.out
        return (), value

    def may_overwrite(self, stream: Value, reader: Operation) -> bool:
        """Whether `reader` is the last that wants `stream`, which has been made by then."""
        made = self.producer.get(stream.name)
        rest = [u for u in self.users[stream.name] if u is not reader and id(u) not in self.done]
        return made is not None and id(made) in self.done and not rest

    # -- what lies between the projections and the store of keys and values

    def attention_of(self, store: StoreKV) -> Attention:
        attention = self.only_user(store.out)
        if not isinstance(attention, Attention):
            raise ValueError(
                f"{store.out.name}: the {self.executor} executor stores keys and values for one attention"
            )
        return attention

    def head_chain(self, value: Value) -> tuple[Value, Norm | None, Rope | None]:
        """From a projection to its use: the projection, an optional head norm, an optional rope."""
        rope = norm = None
        op = self.producer[value.name]
        if isinstance(op, Rope):
            rope, value = op, op.x
            op = self.producer[value.name]
        if isinstance(op, Norm) and op.head_dim is not None:
            norm, value = op, op.x
        return value, norm, rope

    def shared_rope(self, query: Rope | None, key: Rope | None, op: StoreKV) -> RopeSpec | None:
        specs = {r.spec if r else None for r in (query, key)}
        if len(specs) > 1:
            raise ValueError(
                f"{op.out.name}: the {self.executor} executor turns queries and keys by one rope"
            )
        return specs.pop()

    def _joins_store(self, op: Operation) -> bool:
        return isinstance(op, Rope) or (isinstance(op, Norm) and op.head_dim is not None)
