"""Calibration samples with pictures: `messages` of a .jsonl file that hold paths of images.

They go through the model's own processor. As transformers' processors have it, the content of a message is a list of
parts: `{"type": "text", "text": …}` and `{"type": "image", "path": …}`; a path is relative to the .jsonl file's folder.
Only local files are read.
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.calibration.sources import BUILTIN, SELF
from qtool.calibration.template import render
from qtool.calibration.text import Calibration, picture_parts, records
from qtool.calibration.tokenizer import load_tokenizer
from qtool.errors import InputError, foreign, in_one_line
from qtool.files import expand

if TYPE_CHECKING:
    import torch

_MOST_BYTES = 1 << 26  # of an image's file
_KINDS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_PATHS = ("path", "image")  # keys of a part that name its file
_PART = '{"type": "image", "path": "photo.png"}'


def has_pictures(data: str) -> bool:
    """Whether a calibration text is a .jsonl file with pictures. Raises InputError for lines of another kind."""
    if data in (BUILTIN, SELF) or Path(data).suffix.lower() != ".jsonl":
        return False
    return any(any(picture_parts(record)) for record, _ in records(expand(data)))


def load(data: str, folder: Path, *, samples: int, seq_len: int, trust_remote_code: bool) -> Calibration:
    """Samples of `seq_len` tokens: lines one after the other until they fill a sample; what is too much is cut off.

    Args:
        data: a .jsonl file, where `has_pictures`.
        folder: of the model.

    Raises:
        InputError: too little text, an image that is no local file or can't be read, or a model without a processor
            that works here.
    """
    import torch

    path = expand(data)
    processor = _processor(folder, trust_remote_code)
    found: list[dict[str, torch.Tensor]] = []
    text, pictures = "", list[Any]()
    for record, where in records(path):
        more, shown = _conversation(record, processor, path.parent, where)
        text, pictures = text + more, pictures + shown
        inputs = _processed(processor, text, pictures, where)
        if inputs["input_ids"].shape[1] >= seq_len:
            found.append(inputs)
            text, pictures = "", []
        if len(found) == samples:
            break
    if len(found) < samples:
        raise InputError(
            f"too little text: its lines fill {len(found)} samples of {seq_len} tokens, not {samples}",
            where=data,
            hint=f"give more lines, or use --samples {len(found)}" if found else "use a smaller --seq-len",
        )
    ids = torch.cat([inputs["input_ids"][:, :seq_len] for inputs in found])
    return Calibration(ids, _digest(found, seq_len), path.name, tuple(found))


def _processor(folder: Path, trust_remote_code: bool) -> Any:
    """The model's own, with pictures prepared by Pillow.

    Many ask for torchvision only because they know videos as well: they do without.
    """
    from transformers import AutoProcessor

    options = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    hint = "copy preprocessor_config.json or processor_config.json from the original model, or calibrate on text"
    try:
        with foreign("no usable processor for pictures", where=str(folder), hint=hint):
            try:
                return AutoProcessor.from_pretrained(str(folder), **options)
            except (ImportError, ValueError) as error:
                if not any(word in str(error).lower() for word in ("torchvision", "video processor")):
                    raise
                return _without_videos(folder, options)
    except ImportError as error:
        raise InputError(f"the model's processor needs a package: {in_one_line(error)}", where=str(folder)) from error


def _without_videos(folder: Path, options: dict[str, Any]) -> Any:
    """A processor whose part for videos is missing."""
    import transformers
    from transformers import AutoConfig, AutoImageProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    model_type = AutoConfig.from_pretrained(str(folder), **options).model_type
    own = getattr(transformers, PROCESSOR_MAPPING_NAMES[model_type])
    settings = {}
    if any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        settings = own.get_processor_dict(str(folder), local_files_only=True)[0]

    class WithoutVideos(own):  # type: ignore[valid-type, misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(name, argument)

    taken = inspect.signature(own.__init__).parameters.keys() - {"self", "image_processor", "tokenizer", "kwargs"}
    tokenizer = load_tokenizer(folder, trust_remote_code=options["trust_remote_code"])
    return WithoutVideos(
        image_processor=AutoImageProcessor.from_pretrained(str(folder), backend="pil", **options),
        tokenizer=tokenizer,
        **{key: value for key, value in settings.items() if key in taken and not isinstance(value, dict)},
    )


def _conversation(record: Mapping[str, Any], processor: Any, folder: Path, where: str) -> tuple[str, list[Any]]:
    """(the text of a record, its pictures)."""
    if isinstance(text := record.get("text"), str):
        return text, []
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise InputError("each line needs a `text`, or `messages`: a list of {role, content}", where=where)
    pictures = [_picture(part, folder, where) for part in picture_parts(record)]
    plain = [{**message, "content": _without_paths(message.get("content"))} for message in messages]
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if not template:
        raise InputError("`messages` needs a chat template, and this model has none", where=where, hint="use `text`")
    return render(processor.tokenizer, plain, "these messages", where, chat_template=template), pictures


def _without_paths(content: Any) -> Any:
    """Content whose pictures are only named as such: what a template writes must not depend on where a file lies."""
    if not isinstance(content, list):
        return content
    return [
        {"type": "image"} if isinstance(p, dict) and str(p.get("type", "")).startswith("image") else p for p in content
    ]


def _picture(part: Mapping[str, Any], folder: Path, where: str) -> Any:
    """A part's image, RGB. Raises InputError unless it is a local file that Pillow reads, of bounded size."""
    name = next((part[key] for key in _PATHS if isinstance(part.get(key), str)), None)
    if name is None or "://" in name or name.startswith("data:"):
        raise InputError("a picture must be the path of a local file", where=where, hint=f"write it as {_PART}")
    try:
        from PIL import Image
    except ImportError:
        raise InputError("pictures need the package pillow", where=where, hint="pip install pillow") from None
    path = folder / name
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise InputError(f"the image file has more than {_MOST_BYTES >> 20} MB", where=str(path))
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_KINDS) as image:
                return image.convert("RGB")
    except FileNotFoundError:
        raise InputError("no such image file", where=str(path), hint=f"it is named in {where}") from None
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they like
        raise InputError(f"not an image that can be read: {in_one_line(error)}", where=str(path)) from error


def _processed(processor: Any, text: str, pictures: list[Any], where: str) -> dict[str, torch.Tensor]:
    """What the whole model is called with, of one sample."""
    import torch

    with foreign("the model's processor refuses this", where=where, hint="check the messages and their pictures"):
        made = processor(text=[text], images=pictures or None, return_tensors="pt", add_special_tokens=False)
        return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}


def _digest(inputs: list[dict[str, torch.Tensor]], seq_len: int) -> str:
    """SHA-256 of all tensors and the samples' length, in hex."""
    digest = hashlib.sha256(str(seq_len).encode())
    for each in inputs:
        for name, tensor in sorted(each.items()):
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
