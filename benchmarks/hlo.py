"""What a compiled program moves and computes, read from its text: `jax.stages.Compiled.as_text()`."""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "f16": 2, "s8": 1, "u8": 1, "pred": 1}

# The scopes that snax names its arithmetic by, and what they are made of. An instruction is of the innermost one.
KINDS = ("snake", "depthwise_conv", "conv", "strided_conv", "transposed_conv", "noise", "attention", "quantizer")

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")

# Instructions that name values without touching them.
_FREE = {"bitcast", "constant", "copy-done", "custom-call", "get-tuple-element", "parameter", "tuple"}


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    line: str
    operands: list[str]

    @property
    def kind(self) -> str:
        """Which of `KINDS` it comes from; of a fusion, the one that its result comes from."""
        scopes = re.search(r'op_name="([^"]*)"', self.line)
        named = [scope for scope in scopes[1].split("/") if scope in KINDS] if scopes else []
        return named[-1] if named else "other"


class Executed(NamedTuple):
    instruction: Instruction
    times: int
    bytes: int
    main_memory_bytes: int
    cycles: int


def kinds_by_name(text: str) -> dict[str, str]:
    """The kind of every instruction in the program, under the name that a profile shows."""
    bodies = _computations(text)[0].values()
    return {each.name: each.kind for body in bodies for each in body if each.opcode not in {"call", "while"}}


def executed(text: str) -> Iterator[Executed]:
    """The instructions that a run of the program executes, with those of loops as often as they turn.

    Bytes are those of operands and results; what XLA keeps in a TPU's vector memory (`S(1)` in its layout) counts in
    `bytes` only. Cycles are XLA's own estimate where it gives one, as for TPUs.
    """
    computations, entry = _computations(text)
    yield from _walk(computations, entry, 1)


def _walk(computations: dict[str, list[Instruction]], name: str, times: int) -> Iterator[Executed]:
    types = {each.name: each.type for each in computations[name]}
    for each in computations[name]:
        if each.opcode == "while":
            body, condition = (re.search(rf"{what}=%([\w.\-]+)", each.line)[1] for what in ("body", "condition"))
            # A loop that counts to a constant, as `lax.map` does.
            (turns,) = (int(m[1]) for i in computations[condition] if (m := re.search(r" constant\((\d+)\)", i.line)))
            yield from _walk(computations, body, times * turns)
        elif each.opcode not in _FREE:
            cycles = re.search(r'"estimated_cycles":"(\d+)"', each.line)
            moved = [_moved(each, types, everything) for everything in (True, False)]
            yield Executed(each, times, *(times * n for n in moved), times * int(cycles[1]) if cycles else 0)


def size(type_: str, everything: bool = True) -> int:
    """The bytes of an array or a tuple of them, as the program's text names their type; not `everything`: of those in
    main memory."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", type_)
    return sum(
        BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape, layout in arrays
        if dtype in BYTES and (everything or "S(" not in layout)
    )


def _moved(each: Instruction, types: dict[str, str], everything: bool) -> int:
    size_ = functools.partial(size, everything=everything)
    operands = [types.get(name, "") for name in each.operands]
    match each.opcode:
        case "dynamic-update-slice":  # in place
            return 2 * size_(operands[1])
        case "dynamic-slice":
            return 2 * size_(each.type)
        case "copy-start":  # its type names the source too
            return size_(operands[0]) + size_(each.type.split("}, ")[0])
    return size_(each.type) + sum(map(size_, operands))


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\((.*)", line):
            operands = re.findall(r"%([\w.\-]+)", found[4].split("), ")[0])
            computations[name].append(Instruction(found[1], found[2], found[3], line, operands))
    return computations, entry
