"""CLIP score (Hessel et al. 2021, without its factor 2.5): the cosine between CLIP's embeddings
of a picture and of its caption."""
from pathlib import Path

import torch
import torch.nn.functional as F

from cli import UserError


class Clip:
    """CLIP's two encoders, by open_clip from a local file: Clip(file)(pictures, captions) -> cosines [B], float32.

    pictures: float [B, 3, S, S], stacked from what `prepare` makes of PIL images. Raises UserError.
    """

    def __init__(self, file, name="ViT-g-14", device="cpu", prefix=""):
        if not Path(file).is_file():
            raise UserError(f"--clip {file}: no such file; fetch open_clip's weights of {name} (the README says where)")
        import open_clip                                   # here: it takes seconds
        if name not in open_clip.list_models():
            raise UserError(f"--clip-model {name}: open_clip has no such model; "
                            "name one of open_clip.list_models(), as in ViT-g-14")
        try:
            # a full path, so that open_clip does not take it for a tag to download
            model, _, self.prepare = open_clip.create_model_and_transforms(
                name, pretrained=str(Path(file).resolve()), device=device)
        except Exception as error:                         # a damaged pickle raises whatever it likes
            raise UserError(f"--clip {file} does not hold the weights of {name} "
                            f"({' '.join(str(error).split())[:120]}); fetch them again, or give --clip-model") from None
        self.model, self.tokenize = model.eval(), open_clip.get_tokenizer(name)
        self.prefix, self.device = prefix, device

    @torch.no_grad()
    def __call__(self, pictures, captions):
        image = self.model.encode_image(pictures.to(self.device))
        text = self.model.encode_text(self.tokenize([self.prefix + caption for caption in captions]).to(self.device))
        return (F.normalize(image.float(), dim=1) * F.normalize(text.float(), dim=1)).sum(1)
