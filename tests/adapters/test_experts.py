"""experts: one batch with a mixture for each row is each row alone, with images, in the tower too."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from attrs import evolve
from PIL import Image

from medvl.adapters import cache, embed, embedders, experts
from medvl.adapters.embed_config import EmbedConfig
from medvl.adapters.experts import Experts
from medvl.adapters.retrieve import RetrieveConfig, Retrieved
from medvl.language import chat, vlm
from medvl.language.chat import ChatConfig, ModelConfig
from medvl.language.conversations import Conversation
from medvl.weights import compose, lora
from medvl.weights.lora import LoraConfig
from tests import tiny

CONFIGS = {
    "qwen2_vl": tiny.CONFIGS["qwen2_vl"]
    | {"vision_config": tiny.CONFIGS["qwen2_vl"]["vision_config"] | {"patch_size": 14}},
    "internvl": tiny.CONFIGS["internvl"]
    | {
        "vision_config": tiny.CONFIGS["internvl"]["vision_config"]
        | {"image_size": [56, 56], "patch_size": [14, 14]}
    },
}
WORDS = [
    "Where is the lesion in this picture?",
    "How many are there?",
    "Is it on the left or the right side?",
    "A nodule, two cysts.",
]


@pytest.fixture(params=CONFIGS)
def of(request, tmp_path, gen):
    """Six adapters of ranks 2, 4 and 8 on every linear layer, the tower's and the projector's too, and eight prompts with images."""
    model = ModelConfig(config=CONFIGS[request.param], dtype="float32")
    tok = chat.tokenizer_of(model, tmp_path, WORDS * 20)
    talks, params = chat.open_chat(model, ChatConfig(context=256), tok, gen)
    made = []
    for j in range(6):
        a = lora.init_lora(
            LoraConfig(rank=(2, 4, 8)[j % 3], pattern="all-linear", vision=True), talks.skeleton, gen
        )
        for f in a.factors.values():
            f["b"].normal_(std=0.2, generator=gen)
        made.append(a)
    pool = cache.cache_pool(cache.cache_adapters(lambda i: made[i], 10**9))
    return made, Experts(
        chat=talks,
        params=params,
        names=tuple("abcdef"),
        categories=("",) * 6,
        vectors=torch.randn(6, 8, generator=gen),
        embedder=None,
        pool=pool,
        fuse=cache.cache_fusions(pool, 10**9, rule="cat"),
    )


def prompts(tmp_path, n=8):
    held = []
    for i in range(n):
        paths = []
        for j in range(i % 3):  # none, one or two images
            path = tmp_path / f"{i}-{j}.png"
            noise = np.random.default_rng([i, j]).integers(
                0, 255, (56 + 28 * (i % 2), 56 + 56 * j, 3), dtype=np.uint8
            )
            Image.fromarray(noise).save(path)
            paths.append(path)
        text = "<image>\n" * len(paths) + WORDS[i % 3] + " there" * (i % 4)
        held.append(Conversation(messages=({"role": "user", "content": text},), images=tuple(paths)))
    return held


def some(gen, n=8, k=3):
    """Eight different choices of three of six adapters, weights of any kind, one row without any."""
    indices = torch.stack([torch.randperm(6, generator=gen)[:k] for _ in range(n)])
    weights = torch.rand(n, k, generator=gen) + 0.1
    indices[3], weights[3] = -1, 0.0
    return Retrieved(
        indices=indices, similarity=torch.zeros(n, k), weights=weights, abstained=indices[:, 0] < 0
    )


def row(found, i):
    return Retrieved(
        **{k: getattr(found, k)[i : i + 1] for k in ("indices", "similarity", "weights", "abstained")}
    )


def logits(of, data, rows, adapter):
    batch = chat.make_batch(of.chat, data, rows, side="left")
    whose = vlm.visual_rows(batch["ids"], of.chat.skeleton.config["image_token_id"])
    weights = of.params if adapter is None else lora.apply_lora(of.params, adapter, rows=whose)
    inputs = {k: t for k, t in batch.items() if k != "labels"}
    with torch.no_grad():
        return of.chat.skeleton(
            weights, **vlm.model_inputs(of.chat.skeleton, inputs), use_cache=False
        ).logits[:, -1]


def test_one_batch_of_eight_mixtures_is_eight_single_runs(of, tmp_path, gen):
    made, of = of
    data, found = chat.encode_conversations(of.chat, prompts(tmp_path), prompt=True), some(gen)
    together = logits(of, data, range(8), cache.mix_adapters(of.pool, found))
    effect = 0.0
    for i in range(8):
        own = [
            (j, w)
            for j, w in zip(found.indices[i].tolist(), found.weights[i].tolist(), strict=True)
            if j >= 0
        ]
        alone = (
            compose.compose_adapters(
                [made[j] for j, _ in own], [w for _, w in own], mode="fusion", rule="cat"
            )
            if own
            else None
        )
        want = logits(of, data, [i], alone)[0]
        torch.testing.assert_close(together[i], want, rtol=0, atol=1e-5)
        effect = max(effect, float((want - logits(of, data, [i], None)[0]).abs().max()))
    assert effect > 1e-2  # adapters matter
    said = experts.answer_prompts(of, data, range(8), found, "mixture", 12)
    assert said == [experts.answer_prompts(of, data, [i], row(found, i), "mixture", 12)[0] for i in range(8)]
    assert len({*said}) > 1
    assert said == experts.answer_prompts(
        of, data, range(8), found, "fusion", 12
    )  # by "cat" a fusion is the mixture


def test_the_order_of_rows_does_not_matter(of, tmp_path, gen):
    _, of = of
    data, found = chat.encode_conversations(of.chat, prompts(tmp_path), prompt=True), some(gen)
    order = [5, 2, 7, 0, 3, 1, 6, 4]
    turned = Retrieved(
        **{k: getattr(found, k)[order] for k in ("indices", "similarity", "weights", "abstained")}
    )
    said = experts.answer_prompts(of, data, range(8), found, "mixture", 6)
    assert experts.answer_prompts(of, data, order, turned, "mixture", 6) == [said[i] for i in order]


def test_modes_choose_as_they_say(of):
    _, of = of
    queries = of.vectors[[2, 4]]
    own = torch.tensor([2, -1])
    choose = lambda mode, **how: experts.choose_adapters(
        mode, RetrieveConfig(k=3), queries, of.vectors, own=own, **how
    )
    assert choose("bare").indices.shape == (2, 0)
    assert choose("selection").indices.tolist() == [[2], [4]]
    assert choose("mixture").indices[:, 0].tolist() == [2, 4]
    torch.testing.assert_close(choose("mixture").weights, torch.full((2, 3), 1 / 3))
    assert choose("oracle").indices.tolist() == [[2], [-1]]
    assert choose("oracle").abstained.tolist() == [False, True]
    barred = torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor([2]), True)
    assert 2 not in choose("mixture", exclude=barred).indices
    with pytest.raises(ValueError, match=r"oracle needs own \[2\] below 6"):
        experts.choose_adapters("oracle", RetrieveConfig(), queries, of.vectors, own=torch.tensor([6, 0]))


def test_one_experts_answers_four_threads_as_it_answers_one(of, tmp_path):
    """Many questions with their own adapters and images at once: each answer is that of the question asked alone."""
    _, of = of
    # As many components as texts: with fewer, rounding decides which of the texts are seen at all.
    embedder = embedders.fit_local(EmbedConfig(dims=4, shares=(1.0, 0.0)), WORDS)
    vectors = embed.embed_queries(embedder, [*WORDS, *WORDS[:2]])
    of = evolve(of, embedder=embedder, vectors=vectors)
    talks = prompts(tmp_path, 6)
    questions = []
    for n in range(24):
        talk = talks[n % 6]
        text = talk.messages[0]["content"].replace("<image>\n", "") + " please" * (n // 6)
        questions.append((text, talk.images, ("mixture", "selection", "fusion", "bare")[n // 2 % 4]))
    cfg = RetrieveConfig(k=2)

    def ask(question):
        text, images, mode = question
        return experts.ask_experts(of, text, images, mode=mode, cfg=cfg, max_tokens=8)

    alone = [ask(q) for q in questions]
    assert len({a.text for a in alone}) > 10
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, questions)) == alone


def test_rows_without_their_choice(of, tmp_path, gen):
    _, of = of
    data = chat.encode_conversations(of.chat, prompts(tmp_path, 3), prompt=True)
    with pytest.raises(ValueError, match="must be chosen for each of 3 rows, got 8"):
        experts.answer_prompts(of, data, range(3), some(gen), "mixture", 4)


def test_a_chat_saved_and_opened_again(of, tmp_path):
    _, of = of
    chat.save_chat(of.chat, of.params, tmp_path / "model")
    model = ModelConfig(name=str(tmp_path / "model"), dtype="float32")
    again, params = chat.open_chat(
        model, ChatConfig(context=256), chat.tokenizer_of(model, tmp_path), torch.Generator()
    )
    assert all(torch.equal(t, params[n]) for n, t in of.params.items())
    assert again.vision.preprocessor == of.chat.vision.preprocessor
    held = prompts(tmp_path, 3)
    a, b = (chat.encode_conversations(c, held, prompt=True) for c in (of.chat, again))
    assert all(torch.equal(x.ids, y.ids) for x, y in zip(a.samples, b.samples, strict=True))
