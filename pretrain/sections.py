"""The sections of a recipe, and keys of shared ones, that only pretraining has."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain.probe.settings import ProbeSettings
from pretrain.trainer.config import LogConfig, ModelConfig, OptimConfig, StartConfig
from pretrain.trainer.schema import DEFAULT_AS_BEFORE, MAY_CHANGE


class PretrainModelConfig(ModelConfig):
    """The encoder, and how it is computed; `numerics.py` resolves the latter."""

    position: Literal["relative", "sincos", "learned", "bias"] = Field(  # type: ignore[assignment]
        "relative",
        description="relative: LoMaR's contextual relative position; sincos, learned: absolute positions, fixed as in "
        "MAE or learned; bias: a relative bias shared by all blocks, as in SimMIM and BEiT",
    )
    layer_scale: float = Field(
        0.0,
        ge=0,
        description="initial value of the factors on what each block adds (LayerScale): 0.1 in SimMIM; 0: none",
    )
    compile: Annotated[Literal["auto", "on", "off"], MAY_CHANGE] = Field(
        "auto", description="torch.compile of the blocks and both ends of the network; auto: on a GPU, not in ZeRO 3"
    )
    cuda_graphs: Annotated[Literal["auto", "on", "off"], MAY_CHANGE] = Field(
        "auto",
        description="run each pass as a CUDA graph, which the CPU launches in no time; auto: on a GPU if possible",
    )
    attention: Annotated[Literal["auto", "triton", "sdpa"], MAY_CHANGE] = Field(
        "auto", description="attention in windows; triton: our own kernel; auto: that kernel on a GPU if possible"
    )
    residual: Annotated[Literal["fp32", "bf16"], MAY_CHANGE] = Field(
        "fp32", description="precision of the encoder's residual stream; bf16: less memory and time, less exact sums"
    )


class PretrainOptimConfig(OptimConfig):
    """AdamW and its schedule."""

    decay_class_token: bool = Field(True, description="false: no weight decay for the class token, as in SimMIM's code")


class PretrainLogConfig(LogConfig):
    """What is logged and drawn."""

    num_reconstructions: int = Field(8, ge=1, description="rows of reconstructions.png")


class ProbeConfig(ProbeSettings):
    """Measures the encoder during the run; training is the same with and without it."""

    train: str = Field(description="labeled shards or class folders to learn from")
    val: str = Field(description="labeled shards or class folders to classify")
    every_epochs: int = Field(ge=1, description="epochs between measurements; the end of training is measured as well")


Load = Literal["all", "fitting", "encoder"]


class PretrainStartConfig(StartConfig):
    """The weights that a new run starts from: the encoder, and whatever else a file or another run has."""

    run: str | None = Field(
        None,
        description="folder of a pretraining run: the new run starts at step 0 with all that its newest checkpoint has",
    )
    load: Annotated[Load, DEFAULT_AS_BEFORE] = Field(
        "all",
        description="all: the encoder and the decoder or heads in the file, refused if they do not fit; fitting: "
        "whatever fits; encoder: only the encoder",
    )
    optimizer: bool = Field(
        False, description="with `run`: also load the optimizer's moments instead of starting from zeros"
    )

    @model_validator(mode="after")
    def _says_one_thing(self) -> "PretrainStartConfig":
        if self.run and self.checkpoint:
            raise ValueError("start.checkpoint and start.run both say where the weights come from: set one of them")
        if self.weights and not self.checkpoint:
            raise ValueError("start.weights chooses among the weights of start.checkpoint: set that, or leave it out")
        if self.load != "all" and not (self.run or self.checkpoint):
            raise ValueError(f"start.load={self.load} chooses what to load: set start.checkpoint or start.run as well")
        if self.optimizer and not self.run:
            raise ValueError("start.optimizer=true takes the optimizer's moments from start.run: set that as well")
        return self
