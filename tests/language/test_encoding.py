"""Conversations to ids and labels: the peers are the tokenizers' own templates and a scanner over ids that knows only ChatML."""

import logging
import pickle
import random

import pytest
import torch
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers

from medvl.hub import tokens
from medvl.language import encoding, templates
from medvl.language.encoding import TooLong, encode_conversation, encode_fitting, encode_prompt
from medvl.language.templates import (
    INTERN_VL,
    PLACEHOLDERS,
    QWEN_VL,
    TEMPLATES,
    ConversationFormat,
    Placeholder,
)
from tests.tiny import turns

WORDS = [
    "nodule",
    "8 mm",
    "Ödem",
    "肺结节",
    "🫁",
    "the heart is normal.",
    "no effusion;",
    "½",
    "a  b",
    "x\ny",
    "\n\n",
    "- liver",
    "\ttab",
    "é",
]
ENDS = {"chatml": "<|im_end|>", "qwen2": "<|im_end|>", "phi3": "<|end|>", "phi4": "<|im_end|>"}
MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|im_sep|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|system|>",
    "<|end|>",
)


def encode(tok, messages, *, visual=(), turns="all", **settings):
    return encode_conversation(tok, messages, ConversationFormat(**settings), visual=visual, turns=turns)


def prompt_of(tok, messages, *, visual=(), turns="all", **settings):
    return encode_prompt(tok, messages, ConversationFormat(**settings), visual=visual, turns=turns)


def encode_all(tok, conversations, *, visual=None, turns=(), names=(), **settings):
    fmt = ConversationFormat(**settings)
    return encode_fitting(tok, conversations, fmt, visual=visual, turns=turns, names=names)


def small(strips=False, start=True):
    """A byte-level BPE tokenizer that keeps texts as they are, puts a start token first and, where asked, strips around special tokens."""
    tok = tokens.train_bpe(["the heart is normal. no effusion; nodule 8 mm user assistant system " * 3], 400)
    tok.backend_tokenizer.normalizer = None
    tok.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = (*MARKS, "<|user|>", "<|assistant|>")
    tok.add_tokens(
        [AddedToken(m, special=True, normalized=False, lstrip=strips, rstrip=strips) for m in marks],
        special_tokens=True,
    )
    tok.chat_template = TEMPLATES["chatml"]
    if not start:
        tok.bos_token = None
    return tok


def spaced(every_piece):
    """The same with sentencepiece's space before the first word, of the text or of every piece between special tokens."""
    tok = small(start=False, strips=every_piece)
    back = tok.backend_tokenizer
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if every_piece:
        back.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        pre = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first", split=False), pre])
    back.pre_tokenizer = pre
    back.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]
    )
    return tok


@pytest.fixture(scope="module")
def bpe():
    return small()


@pytest.fixture(scope="module")
def real(shared_data):
    """{name: (tokenizer, template)}; Phi-3 both as transformers loads the folder and as its file says."""
    folder = shared_data / "tokenizers"
    qwen2, qwen3, phi = (tokens.tokenizer(folder / n) for n in ("qwen2.5", "qwen3", "phi-3-mini"))
    file = tokens.tokenizer(folder / "phi-3-mini" / "tokenizer.json")
    return {
        "qwen2.5": (qwen2, None),
        "qwen3": (qwen3, "chatml"),
        "phi": (phi, None),
        "phi3": (phi, "phi3"),
        "phi file": (file, "phi3"),
    }


def cases(bpe):
    strict = small(strips=True, start=False)
    return {
        "bpe": (bpe, None),
        "phi4": (strict, "phi4"),
        "first": (spaced(False), "phi3"),
        "each": (spaced(True), "phi3"),
    }


@pytest.fixture(scope="module")
def every(bpe, request):
    """All tokenizers there are."""
    try:
        return cases(bpe) | request.getfixturevalue("real")
    except pytest.skip.Exception:
        return cases(bpe)


def end_of(tok, template):
    return ENDS.get(template, "<|end|>" if "<|end|>" in (tok.chat_template or "") else "<|im_end|>")


def exact(tok, ids):
    """Text of ids in the middle of a text (decoders drop the first space of sentencepiece)."""
    mark = encoding.tokenizer_traits(tok).anchor
    lead = tok.convert_tokens_to_ids(mark) if mark else None
    text = tok.decode([lead, *ids] if mark else ids, clean_up_tokenization_spaces=False)
    return text.removeprefix(mark)


def whole(tok, messages, template, answer=False):
    """Ids of the rendered text at once, as transformers makes them."""
    text = tok.apply_chat_template(
        messages,
        chat_template=TEMPLATES.get(template, template),
        tokenize=False,
        add_generation_prompt=answer,
    )
    start = [tok.bos_token_id] if tok("")["input_ids"][:1] == [tok.bos_token_id] else []
    return start + tok(text, add_special_tokens=False)["input_ids"]


def check(tok, template, messages):
    """Every answer and its end token are trained and nothing else; before each stand the ids of its prompt."""
    sample = encode(tok, messages, template=template)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    labels = torch.full_like(sample.ids, -100)
    assert len(sample.trained) == len(answers)
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for (a, b), answer, i in zip(sample.trained, answers, places, strict=True):
        end = end_of(tok, template)
        assert tok.convert_ids_to_tokens(int(sample.ids[b - 1])) == end
        assert exact(tok, sample.ids[a : b - 1].tolist()) == answer
        labels[a:b] = sample.ids[a:b]
        prompt = prompt_of(tok, messages[:i], template=template)
        assert prompt.ids.tolist() == sample.ids[:a].tolist()
        assert (prompt.labels == -100).all()
        assert not prompt.trained
    assert torch.equal(sample.labels, labels)
    return sample


CHAT = [
    turns("Is there a nodule?", "Yes, 8 mm."),
    turns("What is it?", "CT.", "And this?", "An MR image.", "Thanks", "You are welcome."),
]
CHAT += [
    turns(
        "Describe.",
        "The heart is normal.\nNo effusion.",
        "Erklären Sie?",
        "肺结节 🫁",
        system="You are a radiologist.",
    )
]


def test_ids_are_those_of_the_whole_text_and_labels_those_of_the_answers(every):
    for name, (tok, template) in every.items():
        for messages in CHAT:
            sample = check(tok, template, messages)
            assert sample.ids.tolist() == whole(tok, messages, template), name
            prompt = prompt_of(tok, messages[:-1], template=template)
            assert prompt.ids.tolist() == whole(tok, messages[:-1], template, answer=True), name


def test_answers_of_any_shape(every):
    for tok, template in every.values():
        for answer in [
            "",
            " ",
            "\n",
            "\n\n",
            " yes",
            "\nyes",
            "yes\n",
            "yes \n ",
            "\n\n - a\n - b\n\n",
            "é́",
            "🫁",
            "\r\n",
            "a\tb",
        ]:
            check(tok, template, turns("q", answer, "r", "s"))
            check(tok, template, turns("q", "s", "r", answer))
            sample = encode(tok, turns("q", answer), template=template)
            assert (sample.labels != -100).sum() == 1 if not answer else (sample.labels != -100).sum() >= 2


def test_a_hundred_random_conversations(every):
    dice = random.Random(0)
    for _ in range(100):
        texts = [
            "".join(dice.choices([*WORDS, " ", " "], k=dice.randrange(12)))
            for _ in range(2 * dice.randint(1, 4))
        ]
        messages = turns(*texts, system=dice.choice([None, "Be brief."]))
        for name, (tok, template) in every.items():
            sample = check(tok, template, messages)
            if name in ("bpe", "qwen2.5", "qwen3"):  # the others' special tokens swallow white space
                jinja = TEMPLATES.get(template, template)
                text = tok.apply_chat_template(messages, chat_template=jinja, tokenize=False)
                assert tok.decode(sample.ids).removeprefix(tokens.START) == text


def test_labels_are_those_of_a_scanner_over_ids(real):
    """The answer starts behind <|im_start|>assistant\\n and goes through <|im_end|>."""
    for name in ("qwen2.5", "qwen3"):
        tok, template = real[name]
        for messages in CHAT:
            sample = encode(tok, messages, template=template)
            ids, keep = sample.ids.tolist(), torch.zeros(len(sample.ids), dtype=torch.bool)
            for i in range(len(ids)):
                if ids[i : i + 3] == [151644, 77091, 198]:
                    keep[i + 3 : ids.index(151645, i) + 1] = True
            assert torch.equal(sample.labels, torch.where(keep, sample.ids, -100))


def test_one_start_token_whether_the_template_or_the_tokenizer_writes_it(bpe):
    messages = turns("q", "a")
    ids = encode(bpe, messages).ids.tolist()
    assert ids[0] == bpe.bos_token_id
    assert ids.count(bpe.bos_token_id) == 1
    assert bpe.eos_token_id not in ids
    assert encode(bpe, messages, template="{{ bos_token }}" + TEMPLATES["chatml"]).ids.tolist() == ids
    assert encode(small(start=False), messages).ids.tolist() == ids[1:]


def test_named_templates_are_those_of_the_checkpoints(bpe, real):
    def text(name, *texts, answer=True):
        return bpe.apply_chat_template(
            turns(*texts), chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=answer
        )

    assert (
        text("phi3", "Q")
        == "<|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\n"
    )
    knight = "<|im_start|>system<|im_sep|>\nYou are a medieval knight and must provide explanations to modern people.<|im_end|>\n"
    assert (
        text("phi4", "Q")
        == knight + "<|im_start|>user<|im_sep|>\nQ<|im_end|>\n<|im_start|>assistant<|im_sep|>\n"
    )
    assert text("chatml", "Q") == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    for messages in [*CHAT, turns("q")]:
        for name, own in (("qwen2.5", "qwen2"), ("phi", "phi3")):
            tok = real[name][0]
            system = (
                []
                if name == "qwen2.5" or messages[0]["role"] == "system"
                else turns(system="You are a helpful AI assistant.")
            )
            want = tok.apply_chat_template(system + messages, tokenize=False, add_generation_prompt=True)
            got = tok.apply_chat_template(
                messages, chat_template=TEMPLATES[own], tokenize=False, add_generation_prompt=True
            )
            assert got == want
    assert real["qwen3"][0].apply_chat_template(
        turns("q"), tokenize=False, add_generation_prompt=True
    ) == text("chatml", "q")


def test_a_template_that_shows_training_another_prompt_is_refused(real):
    tok = real["qwen3"][0]  # a thinking model: its template writes <think> before the last answer only
    with pytest.raises(
        ValueError,
        match=r"the tokenizer's chat template must put answer 1 unchanged after the generation prompt.*enable_thinking",
    ):
        encode(tok, turns("q", "a"))
    with pytest.raises(ValueError, match="must end every answer with a special token"):
        encode(tok, turns("q", ""))
    with pytest.raises(ValueError, match=r"answer 1 unchanged.*<think>.*chatml.*chat.options"):
        encode(tok, turns("q", "a", "r", "b"), options={"enable_thinking": False})
    sample = encode(tok, turns("q", "a"), options={"enable_thinking": False})
    assert tok.decode(sample.ids[sample.labels != -100]) == "a<|im_end|>"
    assert tok.decode(sample.ids).endswith("<think>\n\n</think>\n\na<|im_end|>\n")


def test_several_turns_of_a_reasoning_model_are_one_sample_each(real):
    """What is trained is what generation sees: transformers' own text of each prompt, then the answer."""
    tok, off = real["qwen3"][0], {"enable_thinking": False}
    messages = turns("q", "a", "r", "b", "s", "c")
    assert templates.rewrites_history(tok, messages, ConversationFormat(options=off))
    assert not templates.rewrites_history(tok, messages[:2], ConversationFormat(options=off))
    assert not templates.rewrites_history(tok, messages, ConversationFormat(template="chatml"))
    for i in (2, 4, 6):
        sample = encode(tok, messages[:i], options=off, turns="last")
        prompt = tok.apply_chat_template(
            messages[: i - 1], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert prompt.endswith("<think>\n\n</think>\n\n")
        assert tok.decode(sample.ids) == f"{prompt}{messages[i - 1]['content']}<|im_end|>\n"
        assert tok.decode(sample.ids[sample.labels != -100]) == f"{messages[i - 1]['content']}<|im_end|>"
        asked = prompt_of(tok, messages[: i - 1], options=off, turns="last")
        assert asked.ids.tolist() == sample.ids[: len(asked.ids)].tolist()
        assert tok.decode(asked.ids) == prompt


def test_reasoning_in_answers_is_trained_and_left_out_of_the_history(real):
    tok = real["qwen3"][0]
    thought = "<think>\nWhy?\n</think>\n\nYes."
    sample = encode(tok, turns("q", thought))
    assert tok.decode(sample.ids[sample.labels != -100]) == f"{thought}<|im_end|>"
    messages = turns("q", thought, "r", thought)
    assert templates.rewrites_history(tok, messages)
    sample = encode(tok, messages, turns="last")
    assert tok.decode(sample.ids).count("Why?") == 1
    assert tok.decode(sample.ids[sample.labels != -100]) == f"{thought}<|im_end|>"


GLM = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}{% if not enable_thinking %}/nothink{% endif %}"
    "{% elif m.role == 'assistant' %}<|assistant|>\n<think></think>\n{{ m.content | trim }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def test_a_template_that_ends_answers_with_the_next_turn(bpe):
    """As GLM-4.5's: nothing stands behind the last answer, and each begins with a line break that is not in the prompt."""
    with pytest.raises(
        ValueError, match=r'must end every answer with a special token.*chat.end = "<\|user\|>"'
    ):
        encode(bpe, turns("q", "a"), template=GLM)
    sample = encode(bpe, turns("q", "a", "r", "b "), template=GLM, end="<|user|>")
    assert sample.stripped == 1
    assert bpe.decode(sample.ids[sample.labels != -100]) == "\na<|user|>\nb<|user|>"
    asked = prompt_of(bpe, turns("q", "a", "r"), template=GLM, end="<|user|>")
    assert asked.ids.tolist() == sample.ids[: len(asked.ids)].tolist()
    assert encoding.end_ids(bpe, ConversationFormat(template=GLM, end="<|user|>")) == (
        bpe.convert_tokens_to_ids("<|user|>"),
    )
    assert encoding.end_ids(bpe, ConversationFormat(template=GLM)) == ()


R1 = (  # as DeepSeek-R1's: a prompt opens reasoning, and of answers all reasoning is dropped
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>"
    "{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)


def test_answers_as_they_are_behind_the_prompt(bpe):
    """For templates that drop what answers are to be trained on."""
    first, second = "why\n</think>\n\na", "how\n</think>\n\nb"
    with pytest.raises(ValueError, match=r'answer 1 unchanged.*chat.answers = "raw"'):
        encode(bpe, turns("q", first), template=R1)
    sample = encode(bpe, turns("q", first, "r", second), template=R1, turns="raw")
    text = "<|user|>q<|assistant|>\n\na<|end|><|user|>r<|assistant|><think>\n"
    assert bpe.decode(sample.ids).removeprefix(tokens.START) == text + second + "<|end|>"
    assert bpe.decode(sample.ids[sample.labels != -100]) == second + "<|end|>"
    asked = prompt_of(bpe, turns("q", first, "r"), template=R1, turns="raw")
    assert asked.ids.tolist() == sample.ids[: len(asked.ids)].tolist()
    assert (
        encode(bpe, turns("q", " a "), turns="raw").ids.tolist()
        == encode(bpe, turns("q", " a ")).ids.tolist()
    )
    with pytest.raises(ValueError, match="must end every answer with a special token"):
        encode(bpe, turns("q", "a"), template=R1.replace("<|end|>", ""), turns="raw")


def test_a_trimming_template_strips_answers_and_they_are_counted(bpe, caplog):
    template = TEMPLATES["chatml"].replace("m.content", "m.content | trim")
    held = [turns("q", "No. "), turns("q", "\nYes", "r", "No"), turns("q", "Yes")]
    samples, _ = encode_all(bpe, held, template=template)
    assert [s.stripped for s in samples] == [1, 1, 0]
    assert [bpe.decode(s.ids[s.labels != -100]) for s in samples] == [
        "No.<|im_end|>",
        "Yes<|im_end|>No<|im_end|>",
        "Yes<|im_end|>",
    ]
    assert caplog.messages == [
        "2 answers lose white space at their ends, because the given template drops it"
    ]
    assert encode(bpe, turns("q", "No. ")).stripped == 0  # this template keeps it


@pytest.mark.parametrize("between", ["", "\n"])
def test_all_end_tokens_of_an_answer_are_trained(bpe, between):
    """`<|im_end|><|end|>` behind each answer; the header of the next turn, which follows at once, is not trained."""
    template = TEMPLATES["chatml"].replace("<|im_end|>\\n", f"<|im_end|><|end|>{between}")
    assert template != TEMPLATES["chatml"]
    sample = encode(bpe, turns("q", "a", "r", "b"), template=template)
    assert bpe.decode(sample.ids[sample.labels != -100]) == "a<|im_end|><|end|>b<|im_end|><|end|>"
    assert [bpe.decode(sample.ids[slice(*span)]) for span in sample.trained] == [
        "a<|im_end|><|end|>",
        "b<|im_end|><|end|>",
    ]
    assert encoding.end_ids(bpe, ConversationFormat(template=template)) == (
        bpe.convert_tokens_to_ids("<|im_end|>"),
    )  # an answer is over with the first


def test_an_end_token_of_the_last_answer_alone_is_trained_there(bpe):
    template = (
        TEMPLATES["chatml"].replace("<|im_end|>\\n", "<|im_end|>")
        + "{% if not add_generation_prompt %}<|end|>{% endif %}"
    )
    sample = encode(bpe, turns("q", "a", "r", "b"), template=template)
    assert bpe.decode(sample.ids[sample.labels != -100]) == "a<|im_end|>b<|im_end|><|end|>"


def test_the_end_token_is_that_of_the_template(real):
    assert encoding.end_ids(real["qwen3"][0]) == (
        151645,
    )  # though this template takes no plain answer to train on
    for name, end in (("qwen2.5", "<|im_end|>"), ("qwen3", "<|im_end|>"), ("phi", "<|end|>")):
        tok, template = real[name]
        assert encoding.end_ids(tok, ConversationFormat(template=template)) == (
            tok.convert_tokens_to_ids(end),
        )


DATED = (  # as Llama 3.2's
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|system|>Today: {{ date_string }}<|end|>" + TEMPLATES["chatml"]
)


def test_a_template_that_writes_the_date_is_known(bpe):
    assert templates.writes_date(bpe, turns("q", "a"), ConversationFormat(template=DATED))
    assert not templates.writes_date(
        bpe, turns("q", "a"), ConversationFormat(template=DATED, options={"date_string": "26 Jul 2024"})
    )
    assert not templates.writes_date(bpe, turns("q", "a"))
    sample = encode(bpe, turns("q", "a"), template=DATED, options={"date_string": "26 Jul 2024"})
    assert "Today: 26 Jul 2024" in bpe.decode(sample.ids)


def test_a_saved_template_knows_its_options(bpe):
    options = {"date_string": "Märt '24", "flag": False, "deep": {"a": [1, None, 2.5]}}
    template = (
        "{{ date_string }}{% if not flag %}!{% endif %}{{ deep.a[0] }}{{ deep.a[1] is none }}"
        + TEMPLATES["chatml"]
    )
    saved = templates.template_text(bpe, ConversationFormat(template=template, options=options or {}))
    want = encode(bpe, turns("q", "a"), template=template, options=options)
    assert torch.equal(encode(bpe, turns("q", "a"), template=saved).ids, want.ids)
    assert bpe.decode(want.ids).startswith("<|startoftext|>Märt '24!1True")
    other = encode(bpe, turns("q", "a"), template=saved, options={"flag": True})  # what is given counts
    assert bpe.decode(other.ids).startswith("<|startoftext|>Märt '241True")
    assert templates.template_text(bpe, ConversationFormat(template="chatml")) == TEMPLATES["chatml"]
    with pytest.raises(ValueError, match="options of a template must be values of JSON"):
        templates.template_text(bpe, ConversationFormat(options={"x": object()}))


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_images_become_runs_of_visual_tokens(bpe, system):
    messages = turns("<image>\n<image>\nNew?", "Yes.", "And <image>?", "No.", system=system)
    sample = encode(bpe, messages, placeholder=QWEN_VL, visual=[3, 1, 2])
    text = "<|vision_start|>{}<|vision_end|>"
    filled = [dict(m) for m in messages]
    for n in (3, 1, 2):
        m = next(m for m in filled if "<image>" in m["content"])
        m["content"] = m["content"].replace("<image>", text.format("<|image_pad|>" * n), 1)
    assert sample.ids.tolist() == whole(bpe, filled, None)
    assert [b - a for a, b in sample.visual] == [3, 1, 2]
    pad = bpe.convert_tokens_to_ids("<|image_pad|>")
    assert [i for a, b in sample.visual for i in range(a, b)] == (sample.ids == pad).nonzero()[:, 0].tolist()
    assert exact(bpe, sample.ids[sample.labels != -100].tolist()) == "Yes.<|im_end|>No.<|im_end|>"
    prompt = prompt_of(bpe, messages[:-1], placeholder=QWEN_VL, visual=[3, 1, 2])
    assert prompt.ids.tolist() == sample.ids[: len(prompt.ids)].tolist()
    assert prompt.visual == sample.visual


def test_images_with_real_tokenizers(real):
    messages, n = turns("<image>\nWhat is it?", "CT."), 256
    tok = real["qwen2.5"][0]
    sample = encode(tok, messages, placeholder=QWEN_VL, visual=[n])
    filled = turns(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>\nWhat is it?", "CT.")
    assert sample.ids.tolist() == whole(tok, filled, None)
    assert (sample.ids == 151655).sum() == n
    tok = real["phi"][
        0
    ]  # its tokens swallow the line break behind them; the one behind an image is the user's and stays
    sample = encode(
        tok, messages, placeholder=Placeholder(token="<|placeholder1|>"), visual=[n], template="phi3"
    )
    a, b = sample.visual[0]
    assert sample.ids[a:b].tolist() == [32002] * n
    assert tok.decode(sample.ids[:a]) == "<|system|>You are a helpful AI assistant.<|end|><|user|>"
    assert exact(tok, sample.ids[b:].tolist()) == "\nWhat is it?<|end|><|assistant|>CT.<|end|>"


def test_texts_beside_images_may_begin_with_a_space():
    """LLaVA's tokenizer_image_token: chunks are tokenised one by one, each as the slow tokenizer would."""
    tok = spaced(False)
    holder = Placeholder(token="<|image_pad|>", spaced=True)
    messages = turns("a <image> and\n<image>\nWhat?", "<image is no tag here> CT.")
    sample = encode(tok, messages, placeholder=holder, visual=[2, 1], template="phi3")
    text = tok.apply_chat_template(messages, chat_template=TEMPLATES["phi3"], tokenize=False)
    start = tok.convert_tokens_to_ids("<|im_start|>")
    image = tok.convert_tokens_to_ids("<|image_pad|>")
    want = []
    for chunk, count in zip(text.split("<image>"), (2, 1, 0), strict=True):
        # Behind a special token nothing is added, so that the space is this one.
        want += tok(f"<|im_start|> {chunk}", add_special_tokens=False)["input_ids"][1:]
        want += [image] * count
    assert start not in want
    # The answer goes on behind its header, and not behind a space.
    assert sample.ids.tolist() == want[: len(sample.ids)]
    plain = encode(
        tok, messages, placeholder=Placeholder(token="<|image_pad|>"), visual=[2, 1], template="phi3"
    )
    assert len(sample.ids) > len(plain.ids)
    assert [b - a for a, b in sample.visual] == [2, 1]


def test_prompts_of_healthgpt(real):
    """Ids that tokenizer_image_token of LLaVA makes with the slow tokenizers of transformers 4.41.2."""
    phi, qwen = real["phi"][0], real["qwen2.5"][0]
    system = [29871, 32006, 3492, 526, 263, 8444, 319, 29902, 20255, 29889, 32007, 32010]
    question = [5618, 338, 278, 633, 8945, 537, 29973, 32007, 32001]
    asked, n = turns("What is the abnormality?"), 3
    shown = turns("<image>\nWhat is the abnormality?")
    both = turns("First <image>\nthen <image> and\nWhat is the abnormality?")
    fmt = {"placeholder": PLACEHOLDERS["phi3"], "template": "phi3"}
    image = [32002] * n
    # A folder with a config.json is read as tokenizer.json says, which puts a space behind every special token.
    for tok in (phi, real["phi file"][0]):
        assert prompt_of(tok, asked, **fmt).ids.tolist() == system + question
        want = [*system, *image, 29871, 13, *question]
        assert prompt_of(tok, shown, visual=[n], **fmt).ids.tolist() == want
        want = [*system, 6730, 29871, *image, 29871, 13, 6098, 29871, *image, 29871, 322, 13, *question]
        assert prompt_of(tok, both, visual=[n, n], **fmt).ids.tolist() == want
    fmt = {"placeholder": PLACEHOLDERS["qwen2"], "template": "qwen2"}
    sample = prompt_of(qwen, shown, visual=[n], **fmt)
    text = (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    )
    text += "<|im_start|>user\n<|image_pad|>\nWhat is the abnormality?<|im_end|>\n<|im_start|>assistant\n"
    assert sample.ids.tolist() == qwen(text.replace("<|image_pad|>", "<|image_pad|>" * n))["input_ids"]


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("<image> <image> What?", 1, "got 2 tags and 1 images"),
        ("What?", 1, "got 0 tags and 1 images"),
        ("<image> What?", 0, "got 1 tags and 0 images"),
    ],
)
def test_tags_and_images_go_together(bpe, text, images, message):
    holder = Placeholder(token="<|image_pad|>")
    with pytest.raises(ValueError, match=f"every tag '<image>' needs its image, {message}"):
        prompt_of(bpe, turns(text), placeholder=holder, visual=[4] * images)


def test_codes_that_answers_may_hold(bpe):
    tok = small()
    codes = ["<start_index>", *(f"<idx_{i}>" for i in range(8)), "<end_index>"]
    tok.add_tokens([AddedToken(c, special=True, normalized=False) for c in codes], special_tokens=True)
    messages = turns("Reconstruct the image.", "<start_index><idx_3><idx_7><end_index>")
    with pytest.raises(
        ValueError, match=r"message 1 \(assistant\) must not hold special tokens .*<idx_3>, <idx_7>"
    ):
        encode(tok, messages)
    sample = encode(tok, messages, allow=set(codes))
    assert tok.decode(sample.ids[sample.labels != -100]) == "<start_index><idx_3><idx_7><end_index><|im_end|>"
    with pytest.raises(ValueError, match=r"message 0 \(user\) must not hold special tokens .*<idx_3>"):
        encode(tok, turns("<idx_3>", "a"), allow=set(codes))


def test_a_placeholder_that_is_no_special_token_is_refused_in_texts_too():
    tok = small()
    tok.add_tokens([AddedToken("<|fim_pad|>", special=False, normalized=False)])
    holder = Placeholder(token="<|fim_pad|>")
    assert encode(tok, turns("<image> q", "a"), placeholder=holder, visual=[2]).visual[0][1] > 0
    with pytest.raises(ValueError, match=r"message 0 \(user\) .*found <\|fim_pad\|>"):
        encode(tok, turns("<image> <|fim_pad|>", "a"), placeholder=holder, visual=[2])


def test_only_what_follows_the_last_end_token_is_cut(bpe):
    messages = turns("<image> q", "the heart is normal.")
    sample = encode(bpe, messages, placeholder=QWEN_VL, visual=[5])
    stop = sample.trained[-1][1]
    assert stop < len(sample.ids)
    cut = encode(bpe, messages, placeholder=QWEN_VL, visual=[5], context=stop)
    assert cut.ids.tolist() == sample.ids[:stop].tolist()
    assert cut.labels.tolist() == sample.labels[:stop].tolist()
    with pytest.raises(TooLong, match=f"need {stop} tokens, context is {stop - 1}") as e:
        encode(bpe, messages, placeholder=QWEN_VL, visual=[5], context=stop - 1)
    again = pickle.loads(pickle.dumps(e.value))
    assert (again.needed, again.context, str(again)) == (stop, stop - 1, str(e.value))
    prompt = prompt_of(bpe, messages[:1], placeholder=QWEN_VL, visual=[5], context=stop)
    with pytest.raises(TooLong):
        prompt_of(bpe, messages[:1], placeholder=QWEN_VL, visual=[5], context=len(prompt.ids) - 1)


def test_what_is_refused_is_counted(bpe, caplog):
    many = [
        turns("<image> q", "a" * 10),
        turns("<image> q", "a" * 90),
        turns("<image> q", "b"),
        turns("<image> q", "b"),
    ]
    visual = [[4], [4], [99], [4]]
    with caplog.at_level(logging.WARNING):
        samples, refused = encode_all(bpe, many, placeholder=QWEN_VL, visual=visual, context=60)
    assert [i for i, _ in refused] == [1, 2]
    assert max(e.needed for _, e in refused) == 117
    assert (
        "2 of 4 conversations do not fit the context of 60 tokens (the longest needs 117) and are left out"
        in caplog.text
    )
    for got, i in zip(samples, (0, 3), strict=True):
        assert torch.equal(got.ids, encode(bpe, many[i], placeholder=QWEN_VL, visual=[4]).ids)
    caplog.clear()
    assert encode_all(bpe, many, placeholder=QWEN_VL, visual=visual)[1] == []
    assert not caplog.records
    with pytest.raises(ValueError, match="4 of 4 conversations do not fit the context of 5 tokens"):
        encode_all(bpe, many, placeholder=QWEN_VL, visual=visual, context=5)
    with pytest.raises(
        ValueError,
        match="conversation 3: encode: every tag '<image>' needs its image, got 1 tags and 0 images",
    ):
        encode_all(bpe, many, placeholder=QWEN_VL, visual=[*visual[:3], []])
    with pytest.raises(ValueError, match=r"^x.jsonl, line 8: encode: every tag '<image>' needs its image"):
        encode_all(
            bpe,
            many,
            placeholder=QWEN_VL,
            visual=[*visual[:3], []],
            names=[f"x.jsonl, line {i}" for i in (2, 4, 6, 8)],
        )
    with pytest.raises(ValueError, match="one row per conversation, got 1 for 4"):
        encode_all(bpe, many, placeholder=QWEN_VL, visual=[[4]])


@pytest.mark.parametrize("side", ["right", "left"])
def test_collate(bpe, side):
    samples = [encode(bpe, turns("<image> q", "a" * n), placeholder=QWEN_VL, visual=[n]) for n in (1, 9, 4)]
    batch = encoding.collate_samples(samples, 7, side=side, multiple_of=16)
    length = max(len(s.ids) for s in samples)
    assert {k: (v.dtype, v.shape[0]) for k, v in batch.items()} == {
        "ids": (torch.int64, 3),
        "mask": (torch.bool, 3),
        "labels": (torch.int64, 3),
        "visual": (torch.bool, 3),
    }
    assert length <= batch["ids"].shape[1] < length + 16
    assert batch["ids"].shape[1] % 16 == 0
    for i, s in enumerate(samples):
        assert torch.equal(batch["ids"][i][batch["mask"][i]], s.ids)
        assert torch.equal(batch["labels"][i][batch["mask"][i]], s.labels)
        assert (batch["ids"][i][~batch["mask"][i]] == 7).all()
        assert (batch["labels"][i][~batch["mask"][i]] == -100).all()
        assert torch.equal(batch["visual"][i], batch["ids"][i] == bpe.convert_tokens_to_ids("<|image_pad|>"))
        assert bool(batch["mask"][i, 0 if side == "right" else -1])
    assert encoding.collate_samples(samples[1:2], 0)["ids"].shape == (1, length)


def test_collate_errors(bpe):
    sample = encode(bpe, turns("q", "a"))
    for bad in ({"samples": []}, {"side": "up"}, {"multiple_of": 0}):
        with pytest.raises(ValueError, match="needs samples, side right or left and multiple_of >= 1"):
            encoding.collate_samples(**({"samples": [sample], "pad_id": 0} | bad))


def test_show(bpe):
    sample = encode(bpe, turns("<image><image>\nq «x»", "a\n", "r", ""), placeholder=QWEN_VL, visual=[256, 2])
    images = (
        "<|vision_start|><|image_pad|> x 256<|vision_end|><|vision_start|><|image_pad|> x 2<|vision_end|>"
    )
    assert encoding.show_sample(bpe, sample) == (
        f"<|startoftext|><|im_start|>user\n{images}\n"
        "q «x»<|im_end|>\n<|im_start|>assistant\n«a\n<|im_end|>»\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n«<|im_end|>»\n"
        f"\n[{len(sample.ids)} tokens, 258 visual in 2 images, 4 trained in 2 turns]"
    )
    assert "\033[32ma\n<|im_end|>\033[0m" in encoding.show_sample(bpe, sample, ("\033[32m", "\033[0m"))


def test_show_follows_the_labels(bpe):
    sample = encode(bpe, turns("q", "abc"))
    wrong = encoding.Sample(
        ids=sample.ids,
        labels=torch.where(sample.ids == sample.ids[-1], sample.ids, -100),
        trained=sample.trained,
    )
    assert "assistant«\n»abc<|im_end|>«\n»" in encoding.show_sample(bpe, wrong)


BAD = {
    "no messages": ({"messages": []}, "needs a turn of the assistant, got no messages"),
    "no assistant": ({"messages": turns("q")}, "needs a turn of the assistant, got user"),
    "ends with user": ({"messages": turns("q", "a", "r")}, "ending with assistant, got user assistant user"),
    "two users": ({"messages": [*turns("q"), *turns("r", "a")]}, "got user user assistant"),
    "system last": ({"messages": [*turns("q", "a"), *turns(system="s")]}, "got user assistant system"),
    "unknown role": ({"messages": [{"role": "tool", "content": "x"}, *turns("q", "a")]}, "got tool user assistant"),
    "list content": ({"messages": [{"role": "user", "content": [{"type": "text"}]}, *turns("q", "a")[1:]]}, "message 0 must be"),
    "no content": ({"messages": [{"role": "user"}, *turns("q", "a")[1:]]}, "message 0 must be"),
    "end token in a text": ({"messages": turns("x <|im_end|>", "a")}, r"message 0 \(user\) .*found <\|im_end\|>"),
    "in an answer": ({"messages": turns("x", "a<|im_start|>")}, r"message 1 \(assistant\) .*found <\|im_start\|>"),
    "placeholder in a text": ({"messages": turns("<|image_pad|>", "a")}, r"message 0 \(user\) .*found <\|image_pad\|>"),
    "start token in system": ({"messages": turns("x", "a", system="<|startoftext|>")}, r"message 0 \(system\)"),
    "more tags": ({"messages": turns("<image><image>", "a"), "visual": [3]}, "got 2 tags and 1 images"),
    "fewer tags": ({"messages": turns("x", "a"), "visual": [3]}, "got 0 tags and 1 images"),
    "tag in an answer": ({"messages": turns("<image>", "<image>"), "visual": [3, 3]}, "only the user's texts may hold the tag '<image>'"),
    "no visual tokens": ({"messages": turns("<image>", "a"), "visual": [0]}, "at least one visual token"),
    "no placeholder": ({"messages": turns("<image>", "a"), "visual": [3], "placeholder": None}, "1 images were given and no placeholder"),
    "no such token": ({"messages": turns("<image>", "a"), "visual": [3], "placeholder": INTERN_VL}, "'<IMG_CONTEXT>' must be one token"),
    "allows what is no token": ({"messages": turns("q", "a"), "allow": ("<box>",)}, "'<box>' must be a special token of the tokenizer"),
    "allows the placeholder": (
        {"messages": turns("<image>", "<|image_pad|>"), "visual": [1], "allow": ("<|image_pad|>",)},
        "'<\\|image_pad\\|>' stands for images, answers must not hold it",
    ),
    "ends with what is no token": ({"messages": turns("q", "a"), "end": "</s>"}, "'</s>' must be a special token of the tokenizer"),
    "no such template": ({"messages": turns("q", "a"), "template": "chatlm"}, "got 'chatlm'; give one of chatml, qwen2, phi3"),
    "broken template": ({"messages": turns("q", "a"), "template": "{% for %}"}, "does not take these messages"),
    "template refuses": ({"messages": turns("q", "a"), "template": "{{ raise_exception('no') }}"}, "does not take these messages: no"),
    "template beyond memory": (
        {"messages": turns("q", "a"), "template": "{{ 'a' * 10**18 }}"},
        "does not take these messages: MemoryError",
    ),
    "template without end": (
        {"messages": turns("q", "a"), "template": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"},
        "does not take these messages: maximum recursion",
    ),
    "half a character": ({"messages": turns("q", "a\udc80")}, r"message 1 must be text that can be written as UTF-8"),
    "template drops": (
        {"messages": turns("q <image>", "a"), "visual": [1], "template": TEMPLATES["chatml"].replace("m.content", "m.content[-1:]")},
        "must keep the 1 tags",
    ),
    "no end token": (
        {"messages": turns("q", "a"), "template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
         "{% if add_generation_prompt %}assistant: {% endif %}"},
        "must end every answer with a special token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_conversations(bpe, name):
    given, said = BAD[name]
    with pytest.raises(ValueError, match=said):
        encode(bpe, **({"placeholder": QWEN_VL} | given))


def test_of_several_templates_the_one_for_conversations_is_taken(bpe):
    tok = small()
    tok.chat_template = {
        "default": TEMPLATES["chatml"],
        "tool_use": "{{ raise_exception('no') }}",
    }  # as Command R and Hermes have them
    assert torch.equal(
        encode(tok, turns("q", "a")).ids,
        encode(bpe, turns("q", "a"), template="chatml").ids,
    )
    assert templates.template_text(tok) == TEMPLATES["chatml"]
    for none in ({"tool_use": "x"}, ["x"], 5):
        tok.chat_template = none
        for use in (
            lambda: encode(tok, turns("q", "a")),
            lambda: encoding.end_ids(tok),
            lambda: templates.template_text(tok),
        ):
            with pytest.raises(ValueError, match=r"the tokenizer has none|chat template must be text, got"):
                use()


def test_bad_prompts_and_tokenizers(bpe):
    with pytest.raises(ValueError, match="ending with user, got user assistant"):
        prompt_of(bpe, turns("q", "a"))
    tok = small()
    tok.chat_template = None
    with pytest.raises(ValueError, match="the tokenizer has none; give one of chatml, qwen2, phi3, phi4"):
        encode(tok, turns("q", "a"))
    with pytest.raises(ValueError, match="a space before every piece needs answers behind a special token"):
        encode(
            spaced(True),
            turns("q", "a"),
            template=templates._make_template("<|im_start|>", ": ", "<|im_end|>"),
        )
    assert (
        encode(tok, turns("q", "a"), template="chatml").ids.tolist()
        == encode(bpe, turns("q", "a")).ids.tolist()
    )
