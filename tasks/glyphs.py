"""Small pictures of one size, and the small networks that tell them apart: what digits, mnist and fashion share."""

from typing import Annotated, Literal

from annotated_types import Ge, Lt
from torch import nn

from tasks.classifier import Classifier
from tasks.networks import small
from tasks.task import Facts, Image, Label, Load, UserError

BLOCKS = 2  # of the residual network, in each of its stages


class Glyphs(Classifier):
    """A picture of one size, field `image` -> one of several classes, field `label`."""

    model: Literal["cnn", "mlp", "residual"] = "cnn"  # network: two convolutions, one hidden layer, residual blocks
    width: Annotated[int, Ge(1)] = 32  # channels of the first convolution, or an eighth of the hidden layer
    stochastic_depth: Annotated[float, Ge(0), Lt(1)] = 0.0  # share of the rows that skip the last residual block

    invariance = (
        "batch normalisation sees the rows of one worker, and stochastic depth draws for them; task.model=mlp is exact"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stochastic_depth and self.model != "residual":
            raise UserError(f"task.stochastic_depth is not used: task.model is {self.model}", "task.model=residual")

    def network(self, facts: Facts, load: Load) -> nn.Module:
        image, label = self.fields["image"], self.fields["label"]
        assert isinstance(image, Image) and isinstance(label, Label), "the fields of this class of tasks"
        classes = label.classes or len(label.names)
        scale = small.Standardise(facts["image"]["mean"], facts["image"]["std"])
        if self.model == "mlp":
            pixels = image.channels * image.height * image.width
            return nn.Sequential(scale, small.mlp(pixels, [8 * self.width], classes))
        if self.model == "cnn":
            return nn.Sequential(scale, small.cnn(image.shape, self.width, classes))
        return nn.Sequential(scale, small.residual(image.shape, self.width, BLOCKS, classes, self.stochastic_depth))
