"""A griffe extension that shows the fields of pydantic's dataclasses as parameters, with their types and defaults.

griffe recognizes `dataclasses.dataclass` only, so this extension replaces the decorator.
"""

from typing import Any

import griffe


class PydanticDataclasses(griffe.Extension):
    def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
        for decorator in cls.decorators:
            call = decorator.value
            if isinstance(call, griffe.ExprCall) and call.canonical_path == "pydantic.dataclasses.dataclass":
                call.function = griffe.ExprName("dataclasses.dataclass")
