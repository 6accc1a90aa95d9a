"""``flower-split generate``: continue prompts with the model that a run ended with."""

import argparse
import os
import sys
from pathlib import Path

from flower_split.errors import ConfigError
from flower_split.results.client_adapter import one_client
from flower_split.results.generation import (
    Message,
    Sampling,
    TextGenerator,
    TrunkServer,
    open_generator,
)
from flower_split.results.samples import TrainedModel, make_samples
from flower_split.runs.samples import FILE
from flower_split.runtime.logs import quiet_libraries
from flower_split.runtime.secret_files import read_secret, token_in
from flower_split.split import CutLayers
from flower_split.wire.client_certificate import ClientCertificate


def generate(arguments: argparse.Namespace) -> int:
    """Continue one prompt, or one line of standard input after the other.

    Raises:
        FlowerSplitError: The run, the model, the trunk or an option is wrong.
    """
    quiet_libraries()
    prompt = arguments.prompt
    if prompt is not None:
        _check_text(prompt, "--prompt")
    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        num_beams=arguments.num_beams,
        seed=arguments.seed,
    )
    cuts = CutLayers.parse(arguments.cuts) if arguments.cuts else None
    client = one_client(arguments.client, arguments.client_dir)
    if arguments.samples is not None:
        model = TrainedModel(run=arguments.run, server=_server(arguments), cuts=cuts, client=client)
        _samples(model, _prompts(arguments), sampling, arguments.chat)
        return 0
    with open_generator(arguments.run, _server(arguments), cuts, client) as generator:
        if prompt is not None:
            _reply(generator, prompt, [], sampling, arguments.chat)
        else:
            _converse(generator, sampling, arguments.chat)
    return 0


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """Return the prompts of ``--samples``: the lines of a file that are not blank.

    Raises:
        ConfigError: There is no such file, it holds none, or ``--prompt`` is given as well.
    """
    path: Path = arguments.samples
    if arguments.prompt is not None:
        raise ConfigError("--samples names the prompts, so --prompt has no meaning beside it.")
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--samples must be a text file in UTF-8 with a prompt on each line; {path} cannot be "
            f"read: {error}."
        ) from error
    if not prompts:
        raise ConfigError(f"--samples needs a prompt on each line; {path} holds none.")
    return prompts


def _samples(model: TrainedModel, prompts: list[str], sampling: Sampling, chat: bool) -> None:
    for sample in make_samples(model, prompts, sampling, chat=chat):
        print(f"prompt:  {sample.prompt}\nbase:    {sample.base}\ntrained: {sample.trained}\n")
    print(f"kept in {model.run / FILE}; flower-split report {model.run} shows them")


def _check_text(prompt: str, where: str) -> None:
    """Refuse bytes that are no UTF-8; Python keeps them as halves of surrogate pairs.

    Raises:
        ConfigError: There are some.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where} must be UTF-8; character {error.start} of it is not. Convert the text, or check "
            "the terminal's encoding (LANG, LC_ALL)."
        ) from error


def _server(arguments: argparse.Namespace) -> TrunkServer | None:
    if not arguments.trunk_address:
        return None
    named = arguments.token_file
    token = read_secret(named, "--token-file") if named else token_in(os.environ, "--token-file")
    certificate = ClientCertificate(arguments.client_certificate, arguments.client_key)
    return TrunkServer(
        arguments.trunk_address, token, arguments.root_certificates, certificate, arguments.proxy
    )


def _converse(generator: TextGenerator, sampling: Sampling, chat: bool) -> None:
    """Answer prompts from standard input until it ends; a conversation remembers what was said."""
    said: list[Message] = []
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"standard input must be UTF-8; byte {error.start} of what was read is not. Convert "
                "the text."
            ) from error
        _check_text(line, "a line of standard input")
        if not line:
            return
        if line.strip():
            said = _reply(generator, line.rstrip("\n"), said, sampling, chat)


def _reply(
    generator: TextGenerator, prompt: str, said: list[Message], sampling: Sampling, chat: bool
) -> list[Message]:
    if not chat:
        generator.continue_text(prompt, sampling, show=True)
        return said
    said = [*said, {"role": "user", "content": prompt}]
    text = generator.answer(said, sampling, show=True)
    return [*said, {"role": "assistant", "content": text}]
