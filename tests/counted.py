"""A task of sixty rows that counts how often it is read."""

import collections

from tasks.task import Label, Source, Task, Vector


class Counted(Task):
    """Twenty rows; says how often it was read."""

    width: int = 1
    source: Source = Source()
    fields = {"vector": Vector(1), "label": Label(classes=2)}
    reads = collections.Counter()

    def examples(self, source):
        self.reads["examples"] += 1
        return [{"vector": [i], "label": i % 2} for i in range(60)]
