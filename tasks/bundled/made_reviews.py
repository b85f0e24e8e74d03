"""Chinese reviews made from templates, for trying things out: they are no benchmark and say nothing about real text.

Some reviews praise or blame throughout; in others one clause concedes the opposite, and denied adjectives ("not
dirty") occur in both, so that the words alone do not give the sentiment away.
"""

import random
from collections.abc import Iterator

# Thing -> its aspects, each with adjectives that praise and adjectives that blame.
THINGS = {
    "酒店": {
        "房间": (("干净", "宽敞", "舒适"), ("脏", "狭小", "潮湿")),
        "服务": (("热情", "周到", "贴心"), ("冷淡", "敷衍", "怠慢")),
        "位置": (("方便", "优越"), ("偏僻", "难找")),
        "早餐": (("丰富", "可口"), ("单调", "难吃")),
    },
    "手机": {
        "屏幕": (("清晰", "细腻"), ("模糊", "刺眼")),
        "电池": (("耐用", "给力"), ("糟糕", "虚标")),
        "做工": (("精致", "扎实"), ("粗糙", "廉价")),
        "系统": (("流畅", "稳定"), ("卡顿", "混乱")),
    },
    "书": {
        "内容": (("充实", "深刻"), ("空洞", "肤浅")),
        "文笔": (("优美", "生动"), ("生硬", "啰嗦")),
        "情节": (("精彩", "感人"), ("无聊", "老套")),
        "印刷": (("清楚", "精美"), ("模糊", "劣质")),
    },
    "餐厅": {
        "味道": (("鲜美", "地道"), ("难吃", "油腻")),
        "环境": (("舒适", "安静"), ("嘈杂", "脏乱")),
        "上菜": (("迅速", "及时"), ("缓慢", "拖拉")),
        "价格": (("实惠", "合理"), ("昂贵", "离谱")),
    },
}
DEGREES = ("很", "非常", "特别", "真的很", "相当", "比较", "")
DENIALS = ("并不{}", "一点也不{}", "不{}", "谈不上{}", "不算{}")
VERDICTS = (
    ("不推荐", "不会再来", "很失望", "后悔", "不值这个价"),
    ("推荐", "下次还会来", "很满意", "没有失望", "值这个价"),
)
OPENINGS = ("", "", "", "说说{}：", "第一次体验这样的{}，", "朋友介绍的{}，", "关于{}，")
CONCESSIONS = (
    "虽然{against}，但是{own}",
    "尽管{against}，不过{own}",
    "{own}，虽然{against}",
    "{against}，好坏相比，还是{own}更重要",
    "{own}，这比{against}更要紧",
)


def reviews(rows: int, seed: int) -> Iterator[tuple[int, str]]:
    """Yields (label, text), 1 for praise, half of them; the same ones for the same seed, and more for more rows."""
    draw = random.Random(seed)
    for _ in range(rows):
        label = draw.randrange(2)
        thing = draw.choice(list(THINGS))
        aspects = draw.sample(list(THINGS[thing]), 3)
        own, second, against = (
            _clause(draw, aspect, THINGS[thing][aspect], bool(label) == agrees)
            for aspect, agrees in zip(aspects, (True, True, False), strict=True)
        )
        if draw.random() < 0.5:
            body = draw.choice(CONCESSIONS).format(own=own, against=against)
        else:
            body = f"{own}，{second}"
        verdict = f"，{draw.choice(VERDICTS[label])}" if draw.random() < 0.3 else ""
        yield label, draw.choice(OPENINGS).format(thing) + body + verdict + draw.choice("。！")


def _clause(
    draw: random.Random, aspect: str, adjectives: tuple[tuple[str, ...], tuple[str, ...]], praises: bool
) -> str:
    praise, blame = adjectives
    if draw.random() < 0.35:
        return aspect + draw.choice(DENIALS).format(draw.choice(blame if praises else praise))
    return aspect + draw.choice(DEGREES) + draw.choice(praise if praises else blame)
