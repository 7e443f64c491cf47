"""Memory traffic and cycles of a compiled program, read from its HLO text (`jax.stages.Compiled.as_text()`)."""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "f16": 2, "s8": 1, "u8": 1, "pred": 1}

# The names of snax's scopes. An instruction belongs to its innermost scope.
KINDS = ("snake", "depthwise_conv", "conv", "strided_conv", "transposed_conv", "noise", "attention", "quantizer")

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")

# Instructions that name values without reading or writing them.
_FREE = {"bitcast", "constant", "copy-done", "custom-call", "get-tuple-element", "parameter", "tuple"}


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    line: str
    operands: list[str]

    @property
    def kind(self) -> str:
        """The kind of layer, one of `KINDS` or "other". A fusion has the kind of its result."""
        scopes = re.search(r'op_name="([^"]*)"', self.line)
        kinds = [scope for scope in scopes[1].split("/") if scope in KINDS] if scopes else []
        return kinds[-1] if kinds else "other"


class InstructionCost(NamedTuple):
    instruction: Instruction
    bytes: int
    main_memory_bytes: int
    cycles: int


def kinds_by_name(text: str) -> dict[str, str]:
    """Return the kind of every instruction in the program, by the instruction's name in a profile."""
    bodies = _computations(text)[0].values()
    instructions = (instruction for body in bodies for instruction in body)
    return {i.name: i.kind for i in instructions if i.opcode not in {"call", "while"}}


def instruction_costs(text: str) -> Iterator[InstructionCost]:
    """Yield the cost of every instruction that a run of the program executes. Loops count once per iteration.

    Bytes are those of operands and results. Arrays that XLA keeps in a TPU's vector memory (`S(1)` in their layout)
    count in `bytes` only. Cycles are XLA's own estimate where it gives one, as for TPUs.
    """
    computations, entry = _computations(text)
    yield from _walk(computations, entry, 1)


def _walk(computations: dict[str, list[Instruction]], name: str, count: int) -> Iterator[InstructionCost]:
    """Yield the costs of `count` runs of one computation."""
    types = {instruction.name: instruction.type for instruction in computations[name]}
    for instruction in computations[name]:
        if instruction.opcode == "while":
            body, condition = (
                re.search(rf"{attribute}=%([\w.\-]+)", instruction.line)[1] for attribute in ("body", "condition")
            )
            # Only loops with a constant number of iterations, such as those of `lax.map`, are supported.
            constants = (re.search(r" constant\((\d+)\)", i.line) for i in computations[condition])
            (iterations,) = (int(constant[1]) for constant in constants if constant)
            yield from _walk(computations, body, count * iterations)
        elif instruction.opcode not in _FREE:
            cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.line)
            traffic = [_traffic(instruction, types, vector_memory) for vector_memory in (True, False)]
            yield InstructionCost(instruction, *(count * n for n in traffic), count * int(cycles[1]) if cycles else 0)


def size(type_: str, vector_memory: bool = True) -> int:
    """Return the bytes of an HLO array or tuple type. Without `vector_memory`, arrays in vector memory do not count."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", type_)
    return sum(
        BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape, layout in arrays
        if dtype in BYTES and (vector_memory or "S(" not in layout)
    )


def _traffic(instruction: Instruction, types: dict[str, str], vector_memory: bool) -> int:
    """Return the bytes that one execution of the instruction reads and writes."""
    size_ = functools.partial(size, vector_memory=vector_memory)
    operands = [types.get(name, "") for name in instruction.operands]
    match instruction.opcode:
        case "dynamic-update-slice":  # in place
            return 2 * size_(operands[1])
        case "dynamic-slice":
            return 2 * size_(instruction.type)
        case "copy-start":  # its type is a tuple that includes the source
            return size_(operands[0]) + size_(instruction.type.split("}, ")[0])
    return size_(instruction.type) + sum(map(size_, operands))


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Return the instructions of every computation by name, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif match := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\((.*)", line):
            operands = re.findall(r"%([\w.\-]+)", match[4].split("), ")[0])
            computations[name].append(Instruction(match[1], match[2], match[3], line, operands))
    return computations, entry
