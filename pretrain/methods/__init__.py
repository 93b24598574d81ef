"""The methods. A new one costs one file beside this and one line here."""

from typing import Any

from pretrain.methods.ae import AutoEncoder
from pretrain.methods.beit import BEiT
from pretrain.methods.lc_mae import LCMAE
from pretrain.methods.lomar import LoMaR
from pretrain.methods.mae import MAE
from pretrain.methods.simmim import SimMIM

METHODS: dict[str, Any] = {
    "ae": AutoEncoder,
    "beit": BEiT,
    "lc_mae": LCMAE,
    "lomar": LoMaR,
    "mae": MAE,
    "simmim": SimMIM,
}
