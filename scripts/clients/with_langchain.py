"""langchain-openai: chats and responses; invoke, stream, batch, tools, structured output, an agent's turn with a result."""

import langchain_openai
from common import QUESTION, Shot, Weather, check, server, weather
from importlib.metadata import version
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool


def ask(chat: langchain_openai.ChatOpenAI) -> None:
    answer = chat.invoke(QUESTION)
    check(answer.usage_metadata["output_tokens"] > 0 and isinstance(answer.text, str), answer)
    messages = [SystemMessage("Be brief."), HumanMessage(QUESTION), answer, HumanMessage("And at night?")]
    chunks = list(chat.stream(messages))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    check(isinstance(whole.text, str) and len(chunks) > 1, whole)
    check(len(chat.batch([QUESTION, "And the fox?"])) == 2)

    weather_tool = tool(weather)
    # Strict, since langchain leaves out of a tool's schema that it has no other arguments.
    called = chat.bind_tools([weather_tool], tool_choice="any", strict=True).invoke(QUESTION)
    check(called.tool_calls and called.tool_calls[0]["name"] == "weather", called)
    results = [ToolMessage(weather_tool.invoke(call["args"]), tool_call_id=call["id"]) for call in called.tool_calls]
    after = chat.bind_tools([weather_tool]).invoke([HumanMessage(QUESTION), called, *results])
    check(isinstance(after.text, str), after)
    streamed = None
    for chunk in chat.bind_tools([Weather], tool_choice="Weather").stream(QUESTION):
        streamed = chunk if streamed is None else streamed + chunk
    check(Weather(**streamed.tool_calls[0]["args"]), streamed)

    check(isinstance(chat.with_structured_output(Shot).invoke(QUESTION), Shot))
    check(isinstance(chat.with_structured_output(Shot, method="function_calling").invoke(QUESTION), Shot))
    check(isinstance(chat.with_structured_output(Shot, strict=True, include_raw=True).invoke(QUESTION)["parsed"], Shot))
    *_, last = chat.with_structured_output(Shot).stream(QUESTION)
    check(isinstance(last, Shot), last)


def main() -> None:
    base_url, model = server()
    arguments = {"base_url": base_url, "model": model, "api_key": "none", "max_retries": 0}
    ask(langchain_openai.ChatOpenAI(**arguments))
    ask(langchain_openai.ChatOpenAI(**arguments, use_responses_api=True))
    check(isinstance(langchain_openai.OpenAI(**arguments).invoke("The fox"), str))
    print(f"langchain-openai {version('langchain-openai')}: all calls answered as expected")


if __name__ == "__main__":
    main()
