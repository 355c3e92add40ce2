"""instructor: its default mode, its modes of JSON, streamed and listed results, and responses."""

import asyncio
from collections.abc import Iterable

import instructor
import openai
from common import QUESTION, Shot, check, server
from importlib.metadata import version


def main() -> None:
    base_url, model = server()
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0)
    messages = [{"role": "user", "content": QUESTION}]
    asked = {"model": model, "messages": messages, "max_retries": 0}
    plain = instructor.from_openai(client)
    shot, completion = plain.create_with_completion(response_model=Shot, **asked)
    check(isinstance(shot, Shot) and completion.usage.total_tokens > 0, shot)
    *_, last = plain.create_partial(response_model=Shot, **asked)
    check(last.camera in ("near", "far"), last)
    modes = instructor.Mode
    for mode in [modes.TOOLS, modes.TOOLS_STRICT, modes.JSON_SCHEMA, modes.RESPONSES_TOOLS]:
        found = instructor.from_openai(client, mode=mode).create(response_model=Shot, **asked)
        check(isinstance(found, Shot), mode, found)
    provided = instructor.from_provider(f"openai/{model}", base_url=base_url, api_key="none")
    check(isinstance(provided.create(response_model=Shot, messages=messages, max_retries=0), Shot))
    asyncio.run(ask_async(base_url, asked))
    print(f"instructor {version('instructor')}: all calls answered as expected")


async def ask_async(base_url: str, asked: dict) -> None:
    client = instructor.from_openai(openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0))
    check(isinstance(await client.create(response_model=Shot, **asked), Shot))


if __name__ == "__main__":
    main()
