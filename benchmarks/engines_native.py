"""The peers that need a conversion: onnxruntime-genai, OpenVINO and llama.cpp.

Each is converted from the files of a workload, as its own documents say it is done.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from workload import Workload

CAPACITY = 2048


class Genai:
    """onnxruntime-genai's own builder and loop: text alone."""

    can_encode = False

    @staticmethod
    def prepare(precision: str, folder: Path) -> None:
        out = folder / "genai"
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(folder / "llama"), "-o", str(out), "-c", str(folder / "genai-cache")]
        command += ["-p", precision, "-e", "cpu", "--extra_options"]
        command += ["int4_accuracy_level=4", "int4_block_size=32"]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
        if built.returncode:
            raise RuntimeError(f"its builder: {built.stderr.strip().rpartition(chr(10))[2]}")

    def __init__(self, precision: str, folder: Path, threads: int):
        import onnxruntime_genai as og

        out = folder / "genai"
        path = out / "genai_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        options = settings["model"]["decoder"]["session_options"]
        options["intra_op_num_threads"] = threads
        path.write_text(json.dumps(settings), encoding="utf-8")
        self.og, self.model = og, og.Model(str(out))
        self.generator: Any = None

    def encode(self, images: int) -> np.ndarray:
        raise NotImplementedError

    def prefill(self, ids: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
        params = self.og.GeneratorParams(self.model)
        params.set_search_options(max_length=CAPACITY, min_length=CAPACITY, do_sample=False)
        self.generator = self.og.Generator(self.model, params)
        self.generator.append_tokens(ids.astype(np.int32)[None])
        logits = np.asarray(self.generator.get_logits())
        self.generator.generate_next_token()  # chooses from these logits; the next call runs
        return logits

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.generator.generate_next_token()


class OpenVino:
    """torch's modules converted, weights compressed by NNCF, the cache inside as state.

    bf16 is what OpenVINO computes in by itself where the CPU has it. Several images are run one by
    one: all at once is no faster and takes more memory.
    """

    can_encode = True

    @staticmethod
    def prepare(precision: str, folder: Path) -> None:
        import openvino as ov
        import torch
        from openvino._offline_transformations import apply_make_stateful_transformation
        from torch_parts import Decoder, load_parts

        tower, llama = load_parts(folder, torch.float32)
        decoder = Decoder.of(llama)
        inputs, names, outputs, _ = decoder.example(7, 5)
        pixels = np.load(folder / "pixels-1.npy")
        with torch.no_grad():
            vision = ov.convert_model(tower, example_input=torch.from_numpy(pixels))
            text = ov.convert_model(decoder, example_input=inputs)
        vision.reshape(list(pixels.shape))
        for port, name in zip(text.inputs, names, strict=True):
            port.get_tensor().set_names({name})
        for port, name in zip(text.outputs, outputs, strict=True):
            port.get_tensor().set_names({name})
        heads, size = llama.config.num_key_value_heads, llama.config.head_dim
        width = llama.config.hidden_size
        shapes = {"inputs_embeds": [1, -1, width], "attention_mask": [1, -1]}
        shapes |= {"position_ids": [1, -1]}
        text.reshape({name: shapes.get(name, [1, heads, -1, size]) for name in names})
        pairs = dict(zip(names[3:], outputs[1:], strict=True))
        reorder_cache(text, names[3:])
        if precision != "bf16":
            import nncf

            modes = nncf.CompressWeightsMode
            mode = modes.INT8_SYM if precision == "int8" else modes.INT4_SYM
            text = nncf.compress_weights(
                text, mode=mode, **({} if precision == "int8" else {"group_size": 32})
            )
            vision = nncf.compress_weights(vision, mode=modes.INT8_SYM)
        apply_make_stateful_transformation(text, pairs)
        empty_states(text)
        for name, model in (("vision", vision), ("text", text)):
            ov.save_model(model, folder / f"openvino-{precision}-{name}.xml")
        table = llama.get_input_embeddings().weight.detach().numpy()
        np.save(folder / f"openvino-{precision}-embedding.npy", table)

    def __init__(self, precision: str, folder: Path, threads: int):
        import openvino as ov

        core = ov.Core()
        options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        self.vision, self.text = (
            core.compile_model(
                folder / f"openvino-{precision}-{name}.xml", "CPU", options
            ).create_infer_request()
            for name in ("vision", "text")
        )
        workload = Workload.read(folder)
        self.pixels = {n: np.load(folder / f"pixels-{n}.npy") for n in workload.images}
        self.image_token_id = workload.image_token_id
        self.table = np.load(folder / f"openvino-{precision}-embedding.npy")
        self.token, self.length = 0, 0

    def encode(self, images: int) -> np.ndarray:
        made = []
        for one in self.pixels[images]:
            self.vision.infer([one[None]])
            made.append(self.vision.get_output_tensor(0).data[0].copy())
        return np.concatenate(made)

    def _run(self, ids: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
        past = self.length
        self.length += len(ids)
        embeds = self.table[ids]
        if features is not None:
            embeds[ids == self.image_token_id] = features
        feeds = {
            "inputs_embeds": embeds[None],
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": np.arange(past, self.length)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        self.text.infer(feeds)
        logits = self.text.get_tensor("logits").data[0, -1]
        self.token = int(logits.argmax())
        return logits

    def prefill(self, ids: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
        self.text.reset_state()
        self.length = 0
        return self._run(ids, features).copy()

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._run(np.array([self.token]))


def reorder_cache(model: Any, names: list[str]) -> None:
    """Pick the cache's rows by an input `beam_idx`, as optimum-intel's exports do.

    OpenVINO's CPU plugin fuses attention with its cache only where it finds this; without it a
    token takes several times as long.
    """
    import openvino as ov
    from openvino import opset13 as ops

    rows = ops.parameter(ov.PartialShape([1]), ov.Type.i32, name="beam_idx")
    rows.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([rows])
    for name in names:
        port = model.input(name)
        readers = port.get_target_inputs()
        picked = ops.gather(port, rows, ops.constant(0, ov.Type.i64))
        for reader in readers:
            reader.replace_source_output(picked.output(0))
    model.validate_nodes_and_infer_types()


def empty_states(model: Any) -> None:
    """Let the states begin without tokens, as optimum-intel's exports say it; the fusion asks."""
    from openvino import opset13 as ops

    shape = ops.shape_of(model.input("inputs_embeds"), output_type="i64")
    batch = ops.gather(shape, ops.constant([0]), ops.constant(0))
    for state in (one for one in model.get_ops() if one.get_type_name() == "ReadValue"):
        _, *sizes = (size.get_min_length() for size in state.get_output_partial_shape(0))
        whole = ops.concat([batch, *(ops.constant(np.array([size])) for size in sizes)], axis=0)
        zero = ops.constant(0.0, state.get_output_element_type(0))
        state.set_arguments([ops.broadcast(zero, whole).output(0)])
    model.validate_nodes_and_infer_types()


class LlamaCpp:
    """llama.cpp through llama-cpp-python's low-level calls: text alone."""

    can_encode = False

    @staticmethod
    def prepare(precision: str, folder: Path) -> None:
        write_gguf(folder / "llama", folder / f"llama-{precision}.gguf", precision)

    def __init__(self, precision: str, folder: Path, threads: int):
        import llama_cpp

        path = folder / f"llama-{precision}.gguf"
        self.vocabulary = Workload.read(folder).vocab_size
        self.lib = llama_cpp
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.use_extra_bufts = False  # 0.3.36 crashes in its AMX kernels (SIGSEGV)
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        if not self.model:
            raise RuntimeError("llama.cpp can't load the GGUF file")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CAPACITY, CAPACITY, 512
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.token = 0

    def encode(self, images: int) -> np.ndarray:
        raise NotImplementedError

    def _run(self, ids: list[int]) -> np.ndarray:
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        batch = self.lib.llama_batch_get_one(tokens, len(ids))
        if self.lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        pointer = self.lib.llama_get_logits_ith(self.context, -1)
        logits = np.ctypeslib.as_array(pointer, (self.vocabulary,))
        self.token = int(logits.argmax())
        return logits

    def prefill(self, ids: np.ndarray, features: np.ndarray | None = None) -> np.ndarray:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        return self._run(ids.tolist()).copy()

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._run([self.token])


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(source: Path, path: Path, precision: str) -> None:
    """The decoder as GGUF without a tokenizer."""
    import gguf
    import ml_dtypes  # noqa: F401 (numpy learns of bfloat16)
    from gguf.quants import quantize
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    kind = gguf.GGMLQuantizationType[precision.upper()]
    for name, tensor in load_file(source / "model.safetensors").items():
        values = tensor.astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            values = interleave(values, heads if "q_proj" in name else kv_heads)
        stored = values if values.ndim == 1 else quantize(values, kind)
        dtype = None if values.ndim == 1 else kind
        writer.add_tensor(gguf_name(name), stored, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module = name.removesuffix(".weight")
    if module in fixed:
        return f"{fixed[module]}.weight"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.weight"


def interleave(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's rotary embedding wants them: halves become pairs."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, weights.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weights.shape))
