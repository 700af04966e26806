"""Trained tokens of conversations with images are those of TRL's assistant-only mode, and never visual ones.

One token differs: TRL also trains the line break that the template writes after <|im_end|>. Generation stops at
<|im_end|>, so that no answer ever holds it.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from medvl.language.conversation_shapes import write_conversations
from medvl.language.conversations import Conversation, read_conversations
from medvl.language.encoding import IGNORE, encode_conversation
from medvl.language.images import open_image
from medvl.language.qwen_vl import count_image_tokens, parse_image_config, patchify_image
from medvl.language.templates import QWEN_VL, TEMPLATES, ConversationFormat
from tests.language.test_qwen_vl import peer_of

MARKS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
WORDS = ["Lasix", "40 mg", "BID", "\n", "is", "there", "an effusion?", "  ", "No.", "8.4 %"]
RAW = {
    "min_pixels": 4 * 28 * 28,
    "max_pixels": 16 * 28 * 28,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
}


def small_tokenizer():
    """A tokenizer of bytes, as Qwen's, with the special tokens of Qwen2.5-VL."""
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([" ".join(WORDS) + "user assistant system You are a helpful assistant."], trainer)
    special = [AddedToken(mark, special=True, normalized=False) for mark in MARKS]
    tok = PreTrainedTokenizerFast(tokenizer_object=bpe, additional_special_tokens=special)
    tok.pad_token, tok.eos_token = "<|endoftext|>", "<|im_end|>"
    tok.chat_template = TEMPLATES["qwen2"]
    return tok


def random_text(rng, images):
    pieces = rng.choices(WORDS, k=rng.randrange(2, 8)) + ["<image>"] * images
    rng.shuffle(pieces)
    return " ".join(pieces)


@pytest.fixture
def conversations(tmp_path):
    """As a file of content blocks gives them: several turns and images, images in the middle of a text."""
    rng = random.Random(0)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        pixels = np.random.default_rng(i).integers(0, 255, (30 + 40 * i, 60 + 9 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    made = []
    for number in range(16):
        messages, images = [], []
        if rng.random() < 0.5:
            messages.append({"role": "system", "content": random_text(rng, 0)})
        for turn in range(rng.randrange(1, 4)):
            count = 1 if turn == 0 else rng.randrange(3)
            images += rng.choices(paths, k=count)
            messages.append({"role": "user", "content": random_text(rng, count)})
            messages.append({"role": "assistant", "content": random_text(rng, 0).strip()})
        made.append(Conversation(messages=tuple(messages), images=tuple(images), id=str(number)))
    write_conversations(tmp_path / "trl.jsonl", made, "trl")
    return read_conversations(tmp_path / "trl.jsonl")


def encode(tok, conversation):
    cfg = parse_image_config(RAW)
    counts = [
        count_image_tokens(cfg, patchify_image(cfg, open_image(path))[1]) for path in conversation.images
    ]
    return encode_conversation(
        tok, conversation.messages, ConversationFormat(placeholder=QWEN_VL), visual=counts
    )


def test_answers_with_their_ends_are_trained_and_no_visual_token(conversations):
    tok = small_tokenizer()
    start, end, pad = (tok.convert_tokens_to_ids(m) for m in ("<|im_start|>", "<|im_end|>", "<|image_pad|>"))
    header = [start, *tok("assistant\n", add_special_tokens=False).input_ids]
    visual = 0
    for conversation in conversations:
        sample = encode(tok, conversation)
        ids = sample.ids.tolist()
        # By the text alone: what stands between a header of the assistant and the end of its turn.
        trained = [False] * len(ids)
        for i in range(len(ids)):
            if ids[i : i + len(header)] == header:
                stop = ids.index(end, i) + 1
                trained[i + len(header) : stop] = [True] * (stop - i - len(header))
        assert (sample.labels != IGNORE).tolist() == trained
        assert torch.equal(sample.labels[torch.tensor(trained)], sample.ids[torch.tensor(trained)])
        assert not (sample.labels == pad).any()
        visual += int((sample.ids == pad).sum())
    assert visual > 100


def test_as_trl_trains_them(conversations, tmp_path):
    trl = pytest.importorskip("trl")
    from transformers import Qwen2_5_VLProcessor
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    templates = Path(trl.__file__).parent / "chat_templates"
    tok = small_tokenizer()
    tok.chat_template = (templates / "qwen2_5_vl.jinja").read_text()

    class Processor(Qwen2_5_VLProcessor):
        """Without a processor of videos, which needs torchvision."""

        def check_argument_for_proper_class(self, name, argument):
            return type(argument)

    processor = Processor(peer_of(RAW), tok, video_processor=None, chat_template=tok.chat_template)
    collate = DataCollatorForVisionLanguageModeling(
        processor,
        assistant_only_loss=True,
        chat_template=(templates / "qwen2_5_vl_training.jinja").read_text(),
    )
    # The records as they are in the file; TRL's loader opens the images.
    lines = (tmp_path / "trl.jsonl").read_text().splitlines()
    for conversation, line in zip(conversations, lines, strict=True):
        images = [Image.open(path) for path in conversation.images]
        batch = collate([json.loads(line) | {"images": images}])
        sample = encode(tok, conversation)
        assert torch.equal(sample.ids, batch["input_ids"][0])
        labels = batch["labels"][0]
        breaks = (sample.ids[:-1] == tok.convert_tokens_to_ids("<|im_end|>")) & (labels[:-1] != IGNORE)
        assert breaks.sum() == sum(m["role"] == "assistant" for m in conversation.messages)
        labels[1:][breaks] = IGNORE
        assert torch.equal(sample.labels, labels)
