"""The methods. A new one needs one file in this folder, one entry in `METHODS` and one in `AnyMethodConfig`."""

from typing import Annotated

from pydantic import Field

from pretrain.methods.ae import AutoEncoder
from pretrain.methods.base import Method
from pretrain.methods.beit import BEiT
from pretrain.methods.lc_mae import LCMAE
from pretrain.methods.lomar import LoMaR
from pretrain.methods.mae import MAE
from pretrain.methods.simmim import SimMIM

METHODS: dict[str, type[Method]] = {
    "ae": AutoEncoder,
    "beit": BEiT,
    "lc_mae": LCMAE,
    "lomar": LoMaR,
    "mae": MAE,
    "simmim": SimMIM,
}
AnyMethodConfig = Annotated[
    AutoEncoder.Config | BEiT.Config | LCMAE.Config | LoMaR.Config | MAE.Config | SimMIM.Config,
    Field(discriminator="name"),
]
