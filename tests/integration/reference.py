"""transformers' own `generate` on the bundled model, fp32: the truth that the service must reproduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from models.shapes_vlm.paths import CHECKPOINT

# two threads on two busy cores wait for each other most of the time
torch.set_num_threads(1)


class Reference:
    def __init__(self) -> None:
        self._processor = AutoProcessor.from_pretrained(CHECKPOINT, backend="pil")
        self._model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logits(self, question: str, images: Sequence[Image.Image], answer: Sequence[int]) -> torch.Tensor:
        """After the prompt and after each token of an answer, [len(answer) + 1, vocab], computed in one pass."""
        inputs = self.inputs(question, images)
        prompt = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([list(answer)], dtype=torch.long)], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return self._model(**inputs).logits[0, prompt - 1 :]

    def inputs(self, question: str, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """The prompt as the model takes it."""
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
        text = self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        made = self._processor(images=list(images) or None, text=text, add_special_tokens=False, return_tensors="pt")
        return dict(made)

    def generate(
        self, question: str, images: Sequence[Image.Image], *, max_new_tokens: int, ignore_eos: bool = False
    ) -> list[int]:
        inputs = self.inputs(question, images)
        # minus one is no token: generation goes on to the limit
        more = {"eos_token_id": -1} if ignore_eos else {}
        with torch.inference_mode():
            output = self._model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, **more)
        return output[0, inputs["input_ids"].shape[1] :].tolist()
