"""Language and vision-language models: conversations become tokens and labels, a loss, an answer.

`conversations` reads files of conversations (`vqa_rad` writes those of VQA-RAD, `vqa_sets` those of SLAKE and
OmniMedVQA), `messages` checks them and `conversation_shapes` writes them as other programs read them;
`drawings` reads files of pictures that are asked for; `templates` writes conversations as text and `encoding`
as token ids and labels. `images` opens image files (`dicom_image` DICOM), `qwen_vl` and `intern_vl` make patches or tiles of them (`processor_config` is what
their files of settings have in common), `clip_vision` squares for CLIP's tower and levels of it, and
`vision` joins images and text of a model. `vlm` makes the inputs, hidden states and loss of a model,
`cached_forward` its logits token by token; `token_steps` chooses tokens by them and by the settings of
`sampling`, `generate` writes answers with these, `rows_in_flight` those of prompts that join a batch and leave it one
by one, and `likelihood` scores given ones. `json_schema` makes masks of
tokens that keep an answer to a JSON schema, which `bounded_schema` checks and bounds. `awq` quantises a model by its
activations. `chat` and `system`
put all of this together. `measure` takes the time and the memory of answers, `compare` the distance of two
forms of a model.
"""
