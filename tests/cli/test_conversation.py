"""A conversation whose cache has no room for a further prompt behind what it holds."""

from barefoot.cli.conversation import Conversation, encode
from barefoot.engine.config import EngineConfig
from barefoot.engine.runner import Engine
from barefoot.engine.sampling import SamplingParams
from barefoot.engine.specs import model_spec
from barefoot.io.chat import find_chat_template
from barefoot.io.inventory import Checkpoint
from barefoot.io.tokenizer import load_tokenizer
from barefoot.plan.job import parse_kv


def test_a_cache_that_seals_begins_anew_where_a_further_prompt_does_not_fit(tiny_gguf):
    kv = parse_kv("snapkv(keep=64,window=8,room=32) > kivi(bits=4,residual=32)")
    with Checkpoint(tiny_gguf.path) as checkpoint:
        tokenizer, template = load_tokenizer(checkpoint), find_chat_template(checkpoint)
        with Engine(checkpoint, model_spec(checkpoint), EngineConfig(256, kv)) as engine:
            talk = Conversation(engine, tokenizer, template, SamplingParams(), max_tokens=4)
            first = talk.ask("a" * 80, lambda text: None, lambda *_: None)
            assert (first.n_prefilled, engine.position) == (first.n_prompt, first.n_prompt + 3)
            said = [{"role": "user", "content": "a" * 80}, {"role": "assistant", "content": first.text}]
            ids = encode(tokenizer, template, [*said, {"role": "user", "content": "b" * 40}], 256)
            second = talk.ask("b" * 40, lambda text: None, lambda *_: None, ids=ids)  # 64 + 3 + over 40 of 96 slots
            assert second.n_prompt == len(ids)
            assert second.n_prefilled == len(ids)
            engine.reset()
            anew = Conversation(engine, tokenizer, template, SamplingParams(), max_tokens=4)
            assert anew.ask("b" * 40, lambda text: None, lambda *_: None, ids=ids).text == second.text
