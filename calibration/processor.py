"""GLM-4V's processor for images and text, which needs no torchvision.

transformers' own `Glm4vProcessor` (what `AutoProcessor` returns) insists on a video processor, and
that one on torchvision. This subclass leaves videos out and does the rest with the same code, so
`ImageTextProcessor.from_pretrained(folder)` works wherever Pillow does.
"""

from transformers import Glm4vProcessor
from transformers.processing_utils import ProcessorMixin


class ImageTextProcessor(Glm4vProcessor):
    """`Glm4vProcessor` without videos; the same inputs give the same tokens and pixels."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = "<|image|>", "<|video|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.video_start_id = tokenizer.convert_tokens_to_ids("<|begin_of_video|>")
        self.video_end_id = tokenizer.convert_tokens_to_ids("<|end_of_video|>")
