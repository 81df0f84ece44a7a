# SPDX-License-Identifier: Apache-2.0
"""Render chat templates, one for each line of standard input; a program of its own, run by ``template_process``.

A template comes with a tokenizer that others have made. The sandbox keeps it from calling code and reading files, and
the limits of this process keep it from running for ever or filling the memory. Only jinja2 is imported, whose folders
stand in the arguments.
"""

import json
import resource
import sys
from datetime import datetime

if __name__ == "__main__":
    sys.path += sys.argv[4:]

import jinja2  # noqa: E402
from jinja2.ext import Extension, loopcontrols  # noqa: E402
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402


class Generation(Extension):
    """``{% generation %}``, by which templates mark answers for training: what stands within is rendered."""

    tags = {"generation"}

    def parse(self, parser):
        """Return the statements within the tag."""
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


class Namespace(jinja2.utils.Namespace):
    """Jinja's, whose names do not begin with an underscore."""

    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no {name}")
        super().__setitem__(name, value)


class Dict:
    """``dict`` without its attributes."""

    def __call__(self, *args, **kwargs):
        """Return a new dictionary."""
        return dict(*args, **kwargs)


def refuse(message):
    """Raise what a template says."""
    raise jinja2.exceptions.TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Return JSON without the HTML escapes of jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment(date):
    """Return the sandbox that transformers has, with a date that stands still."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = to_json
    made.globals.update(raise_exception=refuse, strftime_now=date.strftime, dict=Dict(), namespace=Namespace)
    return made


def render(request, longest):
    """Return the text of a conversation, of so many characters at most."""
    template = environment(datetime.fromisoformat(request["date"])).from_string(request["template"])
    text = template.render(request["variables"])
    if len(text) > longest:
        raise ValueError(f"it gives {len(text)} characters")
    return text


def main(seconds, memory, longest):
    """Answer requests until there are no more.

    Args:
        seconds: of CPU time for a conversation.
        memory: bytes of this process.
        longest: characters of a conversation.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))
        try:
            answer = {"text": render(json.loads(line), longest)}
        except (Exception, RecursionError) as error:  # whatever a template raises
            answer = {"error": f"{str(error) or type(error).__name__}"[:1000]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
