"""Chats of three clients from the English topics of chatterbot-corpus: naturally not alike.

Every topic is a YAML file with conversations, each a list of turns that begins with the user's.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

CLIENTS: Mapping[str, tuple[str, ...]] = {
    "small talk": (
        *("botprofile", "conversations", "emotion", "food", "gossip", "greetings", "health"),
        *("humor", "psychology"),
    ),
    "knowledge": (
        *("ai", "computers", "history", "literature", "money", "movies", "politics", "science"),
        *("sports", "trivia"),
    ),
    "technical": ("coding", "tech_support"),
}
"""Client, in order of partition -> its topics: each of the 21 belongs to one client."""

_FOLDER = "chatterbot_corpus/data/english"


def write_chats(wheel: Path, out: Path) -> dict[str, int]:
    """Write ``<partition>.jsonl`` for every client of :data:`CLIENTS`, a chat on each line.

    Args:
        wheel: The wheel of chatterbot-corpus.
        out: A directory; made if it is not there.

    Returns:
        Client -> how many chats it has.

    Raises:
        KeyError: The wheel lacks a topic.
    """
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    with zipfile.ZipFile(wheel) as archive:
        for partition, (client, topics) in enumerate(CLIENTS.items()):
            lines = []
            for topic in topics:
                text = archive.read(f"{_FOLDER}/{topic}.yml").decode("utf-8")
                lines += [json.dumps(chat, ensure_ascii=False) for chat in chats_of(text, topic)]
            content = "".join(line + "\n" for line in lines)
            (out / f"{partition}.jsonl").write_text(content, encoding="utf-8")
            counts[client] = len(lines)
    return counts


def chats_of(text: str, topic: str) -> Iterator[dict[str, object]]:
    """Yield a topic's conversations as records with ``messages`` and ``category``.

    A turn that nobody answers ends its chat before it. What is no list of at least two texts is left
    out (one entry of "trivia").
    """
    # BaseLoader: "yes" and "42" are what somebody said, neither a truth value nor a number
    for turns in yaml.load(text, yaml.BaseLoader)["conversations"]:
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            continue
        answered = turns[: len(turns) // 2 * 2]
        roles = ("user", "assistant")
        messages = [
            {"role": roles[index % 2], "content": turn.strip()}
            for index, turn in enumerate(answered)
        ]
        if messages:
            yield {"messages": messages, "category": topic}
