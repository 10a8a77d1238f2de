"""For the documentation's site: functions that take options are shown with each of them, as ``help()`` shows them."""

import importlib
import inspect
from functools import reduce
from typing import Any

import griffe


class DocumentedOptions(griffe.Extension):
    """Puts the signature and docstring that :func:`ooc_influence.options.takes` makes in the place of the source's."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Rewrite a function whose last parameter is ``**options: Unpack[...]``."""
        parameters = list(func.parameters)
        if not parameters or "Unpack[" not in str(parameters[-1].annotation):
            return
        names = func.path.removeprefix(f"{func.module.path}.").split(".")
        made: Any = reduce(getattr, names, importlib.import_module(func.module.path))
        func.parameters = griffe.Parameters(
            *parameters[:-1],
            *(
                griffe.Parameter(
                    option.name, kind=griffe.ParameterKind.keyword_only, default=repr(option.default),
                    annotation=option.annotation if isinstance(option.annotation, str) else str(option.annotation),
                )
                for option in inspect.signature(made).parameters.values()
                if option.name not in {parameter.name for parameter in parameters}
            ),
        )  # fmt: skip
        if func.docstring is not None:
            func.docstring.value = inspect.getdoc(made) or ""
