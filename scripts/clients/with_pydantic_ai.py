"""pydantic-ai: its chat and its responses model; plain and streamed text, tools, types of output in every mode."""

import asyncio

from common import QUESTION, Shot, check, server, weather
from importlib.metadata import version
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


async def ask(model: Model) -> None:
    plain = Agent(model, instructions="Be brief.", system_prompt="You know the coast.")
    first = await plain.run(QUESTION)
    check(isinstance(first.output, str) and first.usage.output_tokens > 0, first)
    second = await plain.run("And at night?", message_history=first.all_messages())
    check(isinstance(second.output, str), second)
    async with plain.run_stream(QUESTION) as streamed:
        pieces = [piece async for piece in streamed.stream_text(delta=True)]
        check(isinstance(await streamed.get_output(), str), pieces)
    # With tools beside it an output is a tool, too: one of both is called until it is the output.
    agent = Agent(model, output_type=Shot, tools=[weather])
    shot = await agent.run(QUESTION)
    check(isinstance(shot.output, Shot), shot)
    check(isinstance((await Agent(model, output_type=NativeOutput(Shot)).run(QUESTION)).output, Shot))
    check(isinstance((await Agent(model, output_type=[ToolOutput(Shot), ToolOutput(bool)]).run(QUESTION)).output, (Shot, bool)))
    async with Agent(model, output_type=Shot).run_stream(QUESTION) as streamed:
        check(isinstance(await streamed.get_output(), Shot))


async def ask_all() -> None:
    base_url, name = server()
    provider = OpenAIProvider(base_url=base_url, api_key="none")
    for model in [OpenAIChatModel(name, provider=provider), OpenAIResponsesModel(name, provider=provider)]:
        await ask(model)
    print(f"pydantic-ai {version('pydantic-ai-slim')}: all calls answered as expected")


if __name__ == "__main__":
    asyncio.run(ask_all())
