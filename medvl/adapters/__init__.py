"""Retrieval of adapters for questions: a registry, the nearest adapters, their mixture, an answer.

`registry` reads and extends lists of adapters, `build` makes one from samples of what each adapter was
trained on. `embedders` fits, opens, saves and reads embedders by their settings (`embed_config`); `embed`
makes vectors of `queries` with them (`embed_local` is what is fitted, `embed_encoder` encoders of the hub).
`retrieve` finds the nearest adapters and their weights. `head` makes a linear map behind an embedder and
`contrast` trains a map or an encoder, by the settings of `retriever_config`; `recall` measures how often the
task of a sample is found (`sample_tasks` numbers and checks tasks). `cache` holds adapters within a budget of
memory and mixes or fuses them; `experts` answers questions with all of these.
"""
