"""Templates of strangers: kept from attributes and files by jinja's sandbox, from time and memory by us."""

from __future__ import annotations

import resource
import signal
import threading
import time
from functools import partial

import pytest
from transformers import PreTrainedTokenizerFast

from awq.cli import generate
from awq.errors import CheckpointError
from awq.pretrained.bounds import bounded
from tests.tiny import byte_tokenizer

HARMFUL = [
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than"),
    ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    ("{{ lipsum(n=10**9) }}", "takes more than"),
    ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "takes more than"),
    ("{{ '%99999999999d' % 1 }}", "takes more than"),
    ("{{ 'a'.center(10**11) }}", "takes more than"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{{ lipsum.__globals__['os'].system('true') }}", "unsafe"),
    ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{% import '/etc/passwd' as x %}", "no loader"),
    ("{% if %}", "Expected an expression"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ nowhere.to.be.found }}", "undefined"),
    ("{{ raise_exception('no user may speak') }}", "no user may speak"),
]


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> PreTrainedTokenizerFast:
    monkeypatch.setattr("awq.pretrained.bounds.bounded", partial(bounded, seconds=0.5, more_bytes=1 << 28))
    return byte_tokenizer()


@pytest.mark.parametrize(("template", "reason"), HARMFUL)
def test_harmful_templates(tokenizer: PreTrainedTokenizerFast, template: str, reason: str) -> None:
    tokenizer.chat_template = template
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    with pytest.raises(CheckpointError, match=f"cannot read the chat template of .*{reason}"):
        generate.encode(tokenizer, "hello", raw=False)
    assert before == (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM))


@pytest.mark.parametrize(
    "template", ["{{ messages.__class__ }}", "{{ raise_exception.__globals__ }}{{ messages[0].x }}"]
)
def test_attributes_that_are_out_of_reach_are_empty(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    tokenizer.chat_template = template + "x"
    encoded = generate.encode(tokenizer, "hello", raw=False)
    assert tokenizer.decode(encoded["input_ids"][0]) == "x"


def test_other_threads_are_not_bounded() -> None:
    """A signal reaches the main thread alone, and a limit of memory everyone."""
    seen: list[object] = []

    def work() -> None:
        with bounded(0.01):
            time.sleep(0.05)
            seen.append(resource.getrlimit(resource.RLIMIT_AS))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [resource.getrlimit(resource.RLIMIT_AS)]


def test_what_is_in_time_is_left_alone() -> None:
    with bounded(5):
        assert len(bytearray(1 << 20)) == 1 << 20
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
