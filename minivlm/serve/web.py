"""The demo page: a gradio app around :class:`~minivlm.serve.chat.Chat`.

Nothing on the page comes from another machine: no fonts, no analytics, no public link unless asked for.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio as gr

from minivlm.config.experiment import DemoConfig
from minivlm.serve.assistant import Tools
from minivlm.serve.web_handlers import MAX_QUESTION, TASKS, Handlers, choose_task, guard_upload

if TYPE_CHECKING:
    from minivlm.serve.chat import Chat

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_MB = 1024 * 1024
_WAITING = 32
"""Questions that may wait for the model; more are turned away."""
_HOUR, _DAY = 3600, 24 * 3600
_MARK_BOX = Path(__file__).parents[1] / "assets" / "mark_box.js"
_FOCUS = "() => document.querySelector('#question textarea, #question input').focus()"

THEME = gr.themes.Soft(
    primary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif"],
    font_mono=["ui-monospace", "Consolas", "Liberation Mono", "monospace"],
).set(
    body_background_fill="*neutral_50",
    block_border_width="1px",
    block_border_color="*neutral_200",
    block_border_color_dark="*neutral_700",
    input_border_width="1px",
    input_border_color="*neutral_300",
    input_border_color_dark="*neutral_600",
    checkbox_border_color="*neutral_400",
    checkbox_border_color_dark="*neutral_500",
    button_border_width="1px",
    button_secondary_border_color="*neutral_300",
    button_secondary_border_color_dark="*neutral_600",
)

CSS = """
.gradio-container {width: 100% !important; max-width: 1160px !important; margin: 0 auto !important}
#title h1 {margin: 0.2em 0 0}
#title p {margin: 0; opacity: 0.75}
#picture img {width: 100%; height: 100%; object-fit: contain}
/* The button to clear is the same as Restart; one below a picture would share it with gradio's makers. */
#conversation .top-panel, #conversation .message-buttons {display: none}
#conversation .message img {max-height: 250px; width: auto; margin: 4px 0}
#conversation .image-container button {justify-content: flex-start}
#tasks::before {content: "Task shortcuts"; align-self: center; font-size: 12px; opacity: 0.75}
#ask {align-items: stretch; gap: 8px}
#send, #restart {min-width: 7em}
#picture.marking img {cursor: crosshair; touch-action: none; user-select: none}
#marked {position: absolute; pointer-events: none; border: 3px solid #f97316; box-shadow: 0 0 0 1px #fff}
.chips {gap: 6px; flex-wrap: wrap}
.chips button {flex: 0 1 auto; min-width: 0; white-space: normal; font-weight: 400}
@media (max-width: 640px) {
  #picture {height: 260px !important}
  #conversation {height: 360px !important}
  #question {flex: 1 0 100%}
  #send, #restart {flex: 1 1 40% !important}
}
"""


def build_page(chat_factory: Callable[[], Chat], demo: DemoConfig, tools: Tools | None = None) -> gr.Blocks:
    """The page; ``chat_factory`` makes the conversation of a visitor, so that no two share one, but all ``tools``."""
    grounding = demo.page == "grounding"
    tools = tools or Tools()
    sees = chat_factory().sees
    handlers = Handlers(chat_factory, tools, grounding=grounding, sees=sees)
    with gr.Blocks(title=demo.title, analytics_enabled=False, fill_width=True, delete_cache=(_HOUR, _DAY)) as page:
        session = gr.State(None, time_to_live=_DAY)
        hint = "; drag over it to mark a box" if grounding else ", or have one drawn" if tools.generator else ""
        use = f"Upload a picture and ask about it{hint}." if sees else "Ask a question; this model takes no pictures."
        gr.Markdown(f"# {demo.title}\n{use}", elem_id="title")
        with gr.Row():
            with gr.Column(scale=2, min_width=280, visible=sees):
                picture = _picture(grounding)
            with gr.Column(scale=3, min_width=280):
                chatbot = _conversation(sees)
        tasks = _chips("tasks", [task.name for task in TASKS] if grounding else [])
        with gr.Row(elem_id="ask"):
            question = _question(sees)
            send = gr.Button("Send", variant="primary", scale=0, elem_id="send")
            restart = gr.Button("Restart", scale=0, elem_id="restart")
        examples = _chips("examples", demo.examples)
        with gr.Row(visible=tools != Tools()):
            ocr, generate = _switches(tools)
        with gr.Row():
            beams, temperature = _sliders(demo)

        settings = [picture, beams, temperature, session, ocr, generate]
        outputs = [chatbot, question, session]
        # One queue for everything that needs the model, so that visitors wait in the order they came.
        model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        asked = [
            gr.on([question.submit, send.click], handlers.ask, [question, *settings], outputs, **model),
            *(button.click(handlers.ask, [button, *settings], outputs, **model) for button in examples),
        ]
        changes = [picture.input, picture.clear]
        changed = gr.on(changes, handlers.change_picture, [picture, session], [chatbot, session], **quick)
        changed.failure(handlers.drop_picture, session, [picture, chatbot, session], **quick)
        anew = gr.on([restart.click, chatbot.clear], handlers.restart, session, outputs, cancels=asked, **quick)
        anew.then(handlers.show, session, chatbot, **quick)  # over a piece of an answer that was on its way
        for task, button in zip(TASKS, tasks):
            chosen = button.click(partial(choose_task, task), question, question, **quick)
            chosen.then(None, js=_FOCUS, **quick)
        if grounding:
            page.load(None, js=_MARK_BOX.read_text(encoding="utf-8"), **quick)
            question.change(None, question, js="text => window.showMarkedBox(text)", **quick)
    return page


def _picture(marking: bool = False) -> gr.Image:
    return guard_upload(
        gr.Image(
            label="Picture",
            type="pil",
            image_mode="RGB",
            sources=["upload", "clipboard"],
            height=430,
            buttons=[],
            elem_id="picture",
            elem_classes=["marking"] if marking else None,
        )
    )


def _conversation(sees: bool) -> gr.Chatbot:
    return gr.Chatbot(
        label="Conversation",
        show_label=False,
        height=430,
        placeholder="Upload a picture, then ask about it." if sees else "Ask a question.",
        render_markdown=False,  # what the model says, as it says it
        buttons=[],
        elem_id="conversation",
    )


def _question(sees: bool) -> gr.Textbox:
    return gr.Textbox(
        placeholder=f"Ask {'about the picture' if sees else 'a question'}; Enter sends",
        label="Question",
        show_label=False,
        container=False,
        max_length=MAX_QUESTION,
        scale=1,
        elem_id="question",
    )


def _chips(name: str, texts: list[str]) -> list[gr.Button]:
    """A row of small buttons."""
    if not texts:
        return []
    with gr.Row(elem_id=name, elem_classes="chips"):
        return [gr.Button(text, size="sm") for text in texts]


def _sliders(demo: DemoConfig) -> tuple[gr.Slider, gr.Slider]:
    beams = gr.Slider(
        1,
        10,
        demo.num_beams,
        step=1,
        label="Beam width",
        info="Above 1 the answer comes in one piece.",
        buttons=[],
        min_width=280,
    )
    temperature = gr.Slider(
        0,
        demo.max_temperature,
        demo.temperature,
        step=0.1,
        label="Temperature",
        info="0 always takes the likeliest word.",
        buttons=[],
        min_width=280,
    )
    return beams, temperature


def _switches(tools: Tools) -> tuple[gr.Checkbox, gr.Checkbox]:
    """Which of the tools a question uses; of those that the page has, OCR is on and drawing off at first."""
    has_ocr, has_generator = tools.ocr is not None, tools.generator is not None
    ocr = gr.Checkbox(
        has_ocr,
        label="Use OCR",
        info="The model is told the text in the picture.",
        visible=has_ocr,
        elem_id="use-ocr",
    )
    generate = gr.Checkbox(
        False,
        label="Generate image",
        info="The model describes a new picture, which is drawn.",
        visible=has_generator,
        elem_id="generate-image",
    )
    return ocr, generate


def launch(
    chat_factory: Callable[[], Chat],
    demo: DemoConfig,
    *,
    tools: Tools | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
) -> None:
    """Serve the page until Ctrl-C; without ``port`` on the first free one from 7860 on.

    Uploads live in a private folder that goes with the server. Raises OSError if the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="minivlm-demo-") as uploads:
        # gradio's own default is one folder for all users of the machine.
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build_page(chat_factory, demo, tools)
        page.queue(max_size=_WAITING, api_open=False)
        _, local, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            max_file_size=demo.max_upload_mb * _MB,
            theme=THEME,
            css=CSS,
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"the page is at {local}  (Ctrl-C ends)", flush=True)
        if public:
            print(f"anyone who knows this address can use it too: {public}", flush=True)
        if host not in LOOPBACK:
            print(f"note: it listens on {host}, so other machines can reach it; it asks for no password", flush=True)
        try:
            page.block_thread()
        finally:
            page.close()
