"""What the two families differ in, apart from their modules."""

from dataclasses import dataclass

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Family:
    """One of the two models.

    Attributes:
        system: the message with which its template begins a conversation that has none.
        mean, std: of each channel, in shares of white.
        lanes: how many vectors beside the first one a piece of a picture gives (DeepStack).
    """

    name: str
    model: str
    system: str | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    lanes: int


QWEN2_5 = Family(
    name="qwen2.5",
    model="shapes-qwen2.5-vl",
    system="You are a helpful assistant.",
    mean=CLIP_MEAN,
    std=CLIP_STD,
    lanes=0,
)
QWEN3 = Family(
    name="qwen3",
    model="shapes-qwen3-vl",
    system=None,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    lanes=2,
)
FAMILIES = {family.name: family for family in (QWEN2_5, QWEN3)}
