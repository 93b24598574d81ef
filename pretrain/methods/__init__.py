"""The methods. A new one needs one file in this folder, one entry in `METHODS` and one in `AnyMethodConfig`.

A method in a file elsewhere is added at run time by `import_methods`.
"""

import importlib
import sys
from pathlib import Path
from typing import Annotated, get_args

from pydantic import Field

from pretrain.methods.ae import AutoEncoder
from pretrain.methods.base import Method
from pretrain.methods.beit import BEiT
from pretrain.methods.lc_mae import LCMAE
from pretrain.methods.local_mim import LocalMIM
from pretrain.methods.lomar import LoMaR
from pretrain.methods.mae import MAE
from pretrain.methods.mff import MFF
from pretrain.methods.simmim import SimMIM
from pretrain.methods.tec import TEC

METHODS: dict[str, type[Method]] = {
    "ae": AutoEncoder,
    "beit": BEiT,
    "lc_mae": LCMAE,
    "local_mim": LocalMIM,
    "lomar": LoMaR,
    "mae": MAE,
    "mff": MFF,
    "simmim": SimMIM,
    "tec": TEC,
}
AnyMethodConfig = Annotated[
    AutoEncoder.Config
    | BEiT.Config
    | LCMAE.Config
    | LocalMIM.Config
    | LoMaR.Config
    | MAE.Config
    | MFF.Config
    | SimMIM.Config
    | TEC.Config,
    Field(discriminator="name"),
]


def import_methods(module: str) -> frozenset[str]:
    """Imports a Python module from outside this project and adds the methods that it defines to `METHODS`.

    Args:
        module: the value of `method.module`: a file, or a dotted name that Python can import.

    Returns:
        The names of the methods.

    Raises:
        ValueError: there is no such module, another module has its name, it defines no method, or the name of a method
            is missing or taken.
    """
    path = Path(module)
    name = path.stem if path.suffix == ".py" else module
    if path.suffix == ".py":
        if not path.is_file():
            raise ValueError(f"method.module={module}: there is no such file")
        if str(path.parent.resolve()) not in sys.path:  # it may import its neighbors, and data workers may import it
            sys.path.append(str(path.parent.resolve()))
    try:
        imported = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # an import inside the module failed: its traceback says more
        raise ValueError(
            f"method.module={module}: Python cannot find module {error.name}; give a file such as my.py"
        ) from None
    if path.suffix == ".py" and Path(imported.__file__ or "").resolve() != path.resolve():
        raise ValueError(
            f"method.module={module}: {imported.__file__} is another module with that name: rename the file"
        )
    found = {}
    for kind in vars(imported).values():
        if isinstance(kind, type) and issubclass(kind, Method) and kind.__module__ == name and "Config" in vars(kind):
            found[_method_name(module, kind)] = kind
    if not found:
        raise ValueError(f"method.module={module} defines no Method with a Config; CONTRIBUTING.md shows one")
    METHODS.update(found)
    return frozenset(found)


def _method_name(module: str, kind: type[Method]) -> str:
    names = get_args(kind.Config.model_fields["name"].annotation)
    if len(names) != 1:
        raise ValueError(f'method.module={module}: write name: Literal["..."] = "..." in {kind.__name__}.Config')
    if names[0] in METHODS and METHODS[names[0]].__module__ != kind.__module__:
        raise ValueError(
            f"method.module={module}: a method named {names[0]} already exists; give {kind.__name__} another name"
        )
    return str(names[0])
