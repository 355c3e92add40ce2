"""OpenAI's own package, for everything that Tale serves: text in three endpoints, pictures, edits, clips.

Usage: with_openai.py BASE_URL TEXT_MODEL IMAGE_MODEL VIDEO_MODEL
"""

import asyncio
import base64
import io
import struct
import sys
import warnings
import zlib

import openai
from common import QUESTION, Shot, Weather

warnings.simplefilter("ignore", DeprecationWarning)  # OpenAI closes its own video service; the client keeps the calls


def refused(status, call, **arguments):
    try:
        call(**arguments)
    except openai.APIStatusError as error:
        assert error.status_code == status, error
        assert error.body["message"] and error.body["type"], error.body
        return error.body
    raise AssertionError(f"{arguments} was not refused")


def check_text(client, model):
    messages = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(model=model, messages=messages, max_tokens=8, seed=1)
    text = whole.choices[0].message.content
    assert whole.choices[0].finish_reason in ("length", "stop") and whole.usage.completion_tokens <= 8, whole
    stream = client.chat.completions.create(
        model=model, messages=messages, max_tokens=8, seed=1, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == text, (streamed, text)
    assert chunks[-1].usage == whole.usage, chunks[-1]
    parts = client.chat.completions.create(
        model=model, max_completion_tokens=8, seed=1, extra_body={"top_k": 5, "ignore_eos": True},
        messages=[{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}],
    )
    assert parts.usage.prompt_tokens == whole.usage.prompt_tokens, parts
    completion = client.completions.create(model=model, prompt=["one", "two"], n=2, max_tokens=4, seed=3)
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3], completion
    pieces = list(client.completions.create(model=model, prompt="one", max_tokens=4, seed=3, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == completion.choices[0].text, pieces
    check_neutral_arguments(client, model, whole)
    check_logprobs(client, model)
    assert refused(404, client.completions.create, model="none", prompt="x")["code"] == "model_not_found"
    wrong = refused(400, client.completions.create, model=model, prompt="x", temperature=9)
    assert wrong["param"] == "temperature", wrong


def check_helpers(client, model):
    """What the package makes of types: schemas, tools, streams that are put together."""
    asked = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "seed": 1}
    assert isinstance(client.chat.completions.parse(response_format=Shot, **asked).choices[0].message.parsed, Shot)
    tools = [openai.pydantic_function_tool(Weather, name="weather")]
    called = client.chat.completions.parse(tools=tools, tool_choice="required", **asked).choices[0].message
    assert all(isinstance(call.function.parsed_arguments, Weather) for call in called.tool_calls), called
    results = [{"role": "tool", "tool_call_id": call.id, "content": "fog"} for call in called.tool_calls]
    messages = [*asked["messages"], called, *results]
    assert client.chat.completions.create(**{**asked, "messages": messages}, tools=tools, max_tokens=4).choices
    with client.chat.completions.stream(response_format=Shot, **asked) as stream:
        stream.until_done()
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Shot)


def check_responses(client, model):
    asked = {"model": model, "input": QUESTION, "extra_body": {"seed": 1}}
    whole = client.responses.create(**asked, max_output_tokens=8)
    assert whole.status in ("completed", "incomplete") and not whole.store and whole.usage.output_tokens <= 8, whole
    events = list(client.responses.create(**asked, max_output_tokens=8, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text == events[-1].response.output_text, events
    assert [event.sequence_number for event in events] == list(range(len(events))), events
    history = [{"role": "user", "content": QUESTION}, *whole.output, {"role": "user", "content": "And at night?"}]
    assert client.responses.create(model=model, input=history, instructions="Be brief.", store=False).usage.output_tokens
    assert isinstance(client.responses.parse(**asked, text_format=Shot).output_parsed, Shot)
    with client.responses.stream(**asked, text_format=Shot) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Shot)

    tool = openai.pydantic_function_tool(Weather, name="weather")["function"]
    tools = [{"type": "function", **tool}]
    for choice in ["required", {"type": "function", "name": "weather"}]:
        called = client.responses.parse(**asked, tools=tools, tool_choice=choice)
        calls = [item for item in called.output if item.type == "function_call"]
        assert calls and all(Weather.model_validate_json(call.arguments) for call in calls), called
        results = [{"type": "function_call_output", "call_id": call.call_id, "output": "fog"} for call in calls]
        items = [{"role": "user", "content": QUESTION}, *called.output, *results]
        after = client.responses.create(model=model, input=items, tools=tools, tool_choice="none", max_output_tokens=4)
        assert after.output[0].type == "message", after
    with client.responses.stream(**asked, tools=tools, tool_choice="required") as stream:
        assert stream.get_final_response().output[0].type == "function_call"

    for argument, value in {"store": True, "previous_response_id": "resp_1", "tools": [{"type": "web_search"}]}.items():
        error = refused(400, client.responses.create, **asked, **{argument: value})
        assert error["param"].startswith(argument) and error["code"] == "unsupported_value", error
    assert refused(404, client.responses.retrieve, response_id="resp_1")["code"] == "not_found"
    asyncio.run(check_async(client, asked))


async def check_async(client, asked):
    async with openai.AsyncOpenAI(base_url=str(client.base_url), api_key="none", max_retries=0) as client:
        stream = await client.responses.create(**asked, stream=True)
        assert [event.type async for event in stream][-1] in ("response.completed", "response.incomplete")


def check_neutral_arguments(client, model, whole):
    """What programs pass without asking for anything, and messages that are sent back as they came."""
    chat = {"model": model, "messages": [{"role": "user", "content": "hello", "name": None}], "max_tokens": 8, "seed": 1}
    nothing = [
        "audio", "function_call", "functions", "logit_bias", "logprobs", "max_completion_tokens", "metadata", "modalities", "n",
        "parallel_tool_calls", "prediction", "presence_penalty", "prompt_cache_key", "reasoning_effort", "response_format",
        "safety_identifier", "service_tier", "stop", "store", "stream_options", "temperature", "tool_choice", "tools",
        "top_logprobs", "top_p", "user", "verbosity", "web_search_options",
    ]
    for arguments in [
        dict.fromkeys(nothing),
        {"user": "u1", "metadata": {"chat": "c1"}, "store": False, "service_tier": "auto", "response_format": {"type": "text"}},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "logit_bias": {}, "logprobs": False, "max_tokens": 8.0},
    ]:
        answer = client.chat.completions.create(**{**chat, **arguments})
        assert answer.choices == whole.choices, (arguments, answer)
    for message in [whole.choices[0].message, whole.choices[0].message.model_dump()]:
        again = [*chat["messages"], message, {"role": "user", "content": "and?"}]
        assert client.chat.completions.create(model=model, messages=again, max_tokens=2).choices
    stream = client.chat.completions.create(**chat, stream=True, stream_options={"include_obfuscation": True})
    assert all(chunk.obfuscation for chunk in stream)
    neutral = {"best_of": 1, "echo": False, "suffix": None, "logprobs": None, "logit_bias": {}, "top_p": 0, "seed": -1}
    assert client.completions.create(model=model, prompt="one", max_tokens=2, **neutral).choices
    for argument, value in {"store": True, "reasoning_effort": "high", "verbosity": "low"}.items():
        error = refused(400, client.chat.completions.create, **{**chat, argument: value})
        assert (error["param"], error["code"]) == (argument, "unsupported_value"), error


def check_logprobs(client, model):
    chat = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "seed": 1}
    told = {"logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**chat, **told).choices[0]
    content = whole.logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode(errors="replace") == whole.message.content, whole
    assert all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in content), whole
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**chat, **told, stream=True)]
    streamed = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.content]
    assert streamed == content, (streamed, content)
    with client.chat.completions.with_streaming_response.create(**chat, **told) as raw:
        assert raw.parse().choices[0].logprobs == whole.logprobs
    completion = {"model": model, "prompt": "one two", "max_tokens": 4, "seed": 3, "echo": True, "logprobs": 2}
    echo = client.completions.create(**completion).choices[0]
    assert echo.text.startswith("one two") and echo.logprobs.token_logprobs[0] is None, echo
    assert len({len(elements) for elements in echo.logprobs.model_dump().values()}) == 1, echo
    pieces = [piece.choices[0] for piece in client.completions.create(**completion, stream=True)]
    lists = [piece.logprobs for piece in pieces if piece.logprobs]
    assert "".join(piece.text for piece in pieces) == echo.text, pieces
    assert [offset for part in lists for offset in part.text_offset] == echo.logprobs.text_offset, lists
    assert [token for part in lists for token in part.tokens] == echo.logprobs.tokens, lists
    alone = client.completions.create(**{**completion, "max_tokens": 0})
    assert alone.choices[0].text == "one two" and alone.usage.completion_tokens == 0, alone
    best = client.completions.create(model=model, prompt="one", max_tokens=4, n=1, best_of=3)
    assert len(best.choices) == 1 and best.usage.completion_tokens > 4, best
    assert refused(400, client.chat.completions.create, **chat, top_logprobs=2)["param"] == "top_logprobs"


def check_images(client, model, size):
    answer = client.images.generate(
        model=model, prompt="a boat", n=2, size=size, response_format="b64_json",
        extra_body={"num_inference_steps": 2, "seed": 7},
    )
    assert all(base64.b64decode(image.b64_json).startswith(b"\x89PNG") for image in answer.data), answer
    assert len(answer.data) == 2 and answer.size == size, answer
    stream = client.images.generate(
        model=model, prompt="a boat", size=size, stream=True, partial_images=2,
        extra_body={"num_inference_steps": 4, "seed": 7},
    )
    *previews, last = list(stream)
    assert [preview.partial_image_index for preview in previews] == [0, 1], previews
    assert all(preview.type == "image_generation.partial_image" for preview in previews), previews
    assert all(base64.b64decode(event.b64_json).startswith(b"\x89PNG") for event in [*previews, last])
    assert last.type == "image_generation.completed" and last.size == size and last.usage.total_tokens == 0, last
    neutral = {"quality": "auto", "background": "opaque", "moderation": "low", "style": None, "user": "u1"}
    plain = client.images.generate(
        model=model, prompt="a boat", size=size, **neutral, extra_body={"num_inference_steps": 2, "seed": 7}
    )
    assert plain.data[0].b64_json == answer.data[0].b64_json, plain.size
    for argument, value in {"quality": "high", "background": "transparent", "style": "vivid"}.items():
        assert refused(400, client.images.generate, model=model, prompt="x", **{argument: value})["param"] == argument


def check_edits(client, model, size):
    answer = client.images.generate(model=model, prompt="a boat", size=size, extra_body={"num_inference_steps": 2, "seed": 7})
    picture = base64.b64decode(answer.data[0].b64_json)
    extra = {"num_inference_steps": 3, "seed": 8, "strength": 0.7, "metadata": False}
    edited = client.images.edit(model=model, prompt="a ship", image=("a.png", picture), n=2, extra_body=extra)
    assert len(edited.data) == 2 and edited.size == size and edited.strength == 0.7, edited
    masked = client.images.edit(
        model=model, prompt="a ship", image=[io.BytesIO(picture)], mask=io.BytesIO(picture_mask(size)), size=size, extra_body=extra
    )
    results = [image.b64_json for image in [*edited.data, *masked.data]]
    assert len(set(results)) == 3 and all(base64.b64decode(b64).startswith(b"\x89PNG") for b64 in results), answer
    many = refused(400, client.images.edit, model=model, prompt="x", image=[picture, picture])
    assert many["param"] == "image" and "2 images" in many["message"], many
    assert refused(400, client.images.edit, model=model, prompt="x", image=b"GIF89a")["param"] == "image"


def picture_mask(size):
    """A PNG whose left half is transparent."""
    width, height = map(int, size.split("x"))
    row = b"\0" + b"".join(bytes([9, 9, 9, 0 if x < width // 2 else 255]) for x in range(width))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * height)) + chunk(b"IEND", b"")


def check_videos(client, model, size):
    extra = {"num_frames": 5, "num_inference_steps": 2}
    video = client.videos.create_and_poll(model=model, prompt="a boat", size=size, extra_body=extra, poll_interval_ms=200)
    assert video.status == "completed" and video.progress == 100 and video.size == size, video
    content = client.videos.download_content(video.id).read()
    assert content[4:8] == b"ftyp", content[:16]
    assert client.videos.retrieve(video.id).id == video.id
    assert video.id in [listed.id for listed in client.videos.list(limit=5)]
    remix = client.videos.remix(video.id, prompt="a car")
    assert client.videos.poll(remix.id, poll_interval_ms=200).remixed_from_video_id == video.id
    assert client.videos.delete(remix.id).deleted
    assert client.videos.delete(video.id).deleted
    assert refused(404, client.videos.retrieve, video_id=video.id)["code"] == "not_found"


def main():
    base_url, text, image, video = sys.argv[1:]
    client = openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0)
    assert {text, image, video} <= {model.id for model in client.models.list()}
    assert client.models.retrieve(text).object == "model"
    check_text(client, text)
    check_helpers(client, text)
    check_responses(client, text)
    check_images(client, image, "64x32")
    check_edits(client, image, "64x32")
    check_videos(client, video, "64x32")
    print(f"openai {openai.__version__}: all calls answered as expected")


if __name__ == "__main__":
    main()
