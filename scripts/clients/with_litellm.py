"""litellm: completions and responses, whole and streamed; tools, schemas."""

import asyncio
import json

import litellm
from common import QUESTION, Place, Shot, check, server
from importlib.metadata import version

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": Place.model_json_schema(),
    },
}


def main() -> None:
    base_url, name = server()
    asked = {"model": f"openai/{name}", "api_base": base_url, "api_key": "none", "num_retries": 0}
    messages = [{"role": "user", "content": QUESTION}]
    whole = litellm.completion(messages=messages, **asked)
    check(whole.usage.completion_tokens > 0, whole)
    chunks = list(litellm.completion(messages=messages, stream=True, **asked))
    check(litellm.stream_chunk_builder(chunks).choices[0].finish_reason in ("stop", "length"), chunks)
    called = litellm.completion(messages=messages, tools=[TOOL], tool_choice="required", **asked).choices[0].message
    check(called.tool_calls[0].function.name == "weather", called)
    results = [{"role": "tool", "tool_call_id": call.id, "content": "fog"} for call in called.tool_calls]
    check(litellm.completion(messages=[*messages, called, *results], tools=[TOOL], **asked).choices)
    shaped = litellm.completion(messages=messages, response_format=Shot, **asked)
    Shot.model_validate_json(shaped.choices[0].message.content)
    check(asyncio.run(litellm.acompletion(messages=messages, **asked)).choices)
    check(litellm.text_completion(prompt="The fox", max_tokens=4, **asked).choices)

    response = litellm.responses(input=QUESTION, **asked)
    check(response.status in ("completed", "incomplete") and response.usage.output_tokens > 0, response)
    events = list(litellm.responses(input=QUESTION, stream=True, **asked))
    check(events[-1].type in ("response.completed", "response.incomplete"), events[-1])
    flat = {"type": "function", **TOOL["function"]}
    called = litellm.responses(input=QUESTION, tools=[flat], tool_choice="required", **asked).output[0]
    check(json.loads(called.arguments)["place"] in ("harbour", "island"), called)
    print(f"litellm {version('litellm')}: all calls answered as expected")


if __name__ == "__main__":
    main()
