# mypy: disable-error-code="import-not-found"
"""Logits of GGUF files by llama.cpp, and its Q4_K_M. Runs in llama.cpp's environment: knows nothing of qtool.

usage: _llama_logits.py logits GGUF WINDOWS.json FOLDER      writes FOLDER/0.npy, ... float32 [tokens, vocabulary]
       _llama_logits.py q4_k_m FLOAT.gguf OUTPUT.gguf

xllamacpp offers neither. But its library exports llama.cpp's C functions, and this calls them. What they take and give
by value are structures whose beginning is known and whose size is not, so room is left: on x86-64 both lie on the stack
or behind a pointer, and the callee takes what it knows. llama_model_quantize is not exported; `q4_k_m` follows its
rules (llama-quant.cpp) for a Llama without experts, with ggml_quantize_chunk.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


class Room(ctypes.Structure):
    _fields_ = (("words", ctypes.c_uint32 * 128),)


class Batch(ctypes.Structure):
    _fields_ = (("tokens", ctypes.c_int32), ("pointers", ctypes.c_void_p * 6))


def library() -> Any:
    import xllamacpp.xllamacpp

    found = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    for name in ("llama_model_default_params", "llama_context_default_params"):
        getattr(found, name).restype = Room
    found.llama_model_load_from_file.restype = ctypes.c_void_p
    found.llama_model_load_from_file.argtypes = (ctypes.c_char_p, Room)
    found.llama_init_from_model.restype = ctypes.c_void_p
    found.llama_init_from_model.argtypes = (ctypes.c_void_p, Room)
    found.llama_model_get_vocab.restype = ctypes.c_void_p
    found.llama_model_get_vocab.argtypes = (ctypes.c_void_p,)
    found.llama_vocab_n_tokens.argtypes = (ctypes.c_void_p,)
    found.llama_get_memory.restype = ctypes.c_void_p
    found.llama_get_memory.argtypes = (ctypes.c_void_p,)
    found.llama_memory_clear.argtypes = (ctypes.c_void_p, ctypes.c_bool)
    found.llama_batch_init.restype = Batch
    found.llama_batch_init.argtypes = (ctypes.c_int32,) * 3
    found.llama_decode.argtypes = (ctypes.c_void_p, Batch)
    found.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    found.llama_get_logits.argtypes = (ctypes.c_void_p,)
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    found.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    )  # fmt: skip
    return found


def logits(file: str, windows: str, folder: str) -> None:
    lib, rows = library(), json.loads(Path(windows).read_text())
    length = len(rows[0])
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(file.encode(), lib.llama_model_default_params())
    settings = lib.llama_context_default_params()
    settings.words[0:3] = [length, length, length]  # n_ctx, n_batch, n_ubatch
    context = lib.llama_init_from_model(model, settings)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    for number, row in enumerate(rows):
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        batch = lib.llama_batch_init(length, 0, 1)
        batch.tokens = length
        tokens, _, positions, counts, sequences, wanted = batch.pointers
        for place, token in enumerate(row):
            ctypes.cast(tokens, ctypes.POINTER(ctypes.c_int32))[place] = token
            ctypes.cast(positions, ctypes.POINTER(ctypes.c_int32))[place] = place
            ctypes.cast(counts, ctypes.POINTER(ctypes.c_int32))[place] = 1
            ctypes.cast(sequences, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32)))[place][0] = 0
            ctypes.cast(wanted, ctypes.POINTER(ctypes.c_int8))[place] = 1
        if code := lib.llama_decode(context, batch):
            sys.exit(f"llama_decode failed: {code}")
        found = np.ctypeslib.as_array(lib.llama_get_logits(context), (length, vocabulary))
        np.save(f"{folder}/{number}.npy", found)


def q4_k_m(source: str, output: str) -> None:
    import gguf

    reader, lib = gguf.GGUFReader(source), library()
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(output, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        of = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=of)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    depth = reader.get_field(f"{architecture}.block_count").contents()
    for tensor in reader.tensors:
        kind = _kind(tensor.name, tensor.shape[0], depth) if len(tensor.shape) == 2 else None
        if kind is None:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        values = np.ascontiguousarray(values.reshape(tensor.shape[1], tensor.shape[0]))
        made = np.empty(gguf.quant_shape_to_byte_shape(values.shape, kind), np.uint8)
        lib.ggml_quantize_chunk(int(kind), values.ctypes.data, made.ctypes.data, 0, *values.shape, None)
        writer.add_tensor(tensor.name, made, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _kind(name: str, columns: int, depth: int) -> Any:
    """llama_tensor_get_type for LLAMA_FTYPE_MOSTLY_Q4_K_M, and its fallback for rows that 256 doesn't divide."""
    import gguf

    types = gguf.GGMLQuantizationType
    more = name in ("token_embd.weight", "output.weight")
    if name.endswith(("attn_v.weight", "ffn_down.weight")):
        layer = int(name.split(".")[1])
        more = layer < depth // 8 or layer >= 7 * depth // 8 or (layer - depth // 8) % 3 == 2
    if columns % 256 == 0:
        return types.Q6_K if more else types.Q4_K
    return types.Q8_0 if more else types.Q5_0


if __name__ == "__main__":
    if sys.argv[1:2] == ["logits"] and len(sys.argv) == 5:
        logits(*sys.argv[2:])
    elif sys.argv[1:2] == ["q4_k_m"] and len(sys.argv) == 4:
        q4_k_m(*sys.argv[2:])
    else:
        sys.exit(__doc__)
