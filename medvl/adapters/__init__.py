"""Retrieval of adapters for questions: a registry, the nearest adapters, their mixture, an answer.

`registry` reads and extends lists of adapters, `build` makes one from samples of what each adapter was
trained on. `embed` (with `embed_local`) makes vectors of questions with images, `retrieve` finds the nearest
adapters and their weights, and `head` trains what they are found by. `cache` holds adapters within a budget
of memory and mixes or fuses them; `experts` answers questions with all of these.
"""
