"""The page: gradio's components around a `Desk`, its queue, and what it must not do: call other hosts."""

import base64
import io
import os
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from flashvsr.app import compare, sample
from flashvsr.app.desk import DEFAULTS, Cancelled, Desk, Result
from flashvsr.base.cli import UserError, sentence
from flashvsr.base.stills import VIDEO_SUFFIXES

HELP = "Choose a clip, press **Upscale**, drag the divider. Clips stay on the machine that serves this page."
NOTHING = '<div class="nothing">The clip appears here.</div>'
STYLE = """
.gradio-container > main { width: 100%; max-width: 1280px; margin: 0 auto; }
#view .html-container { padding: 0; }
#said { min-height: 84px; }
#said .translucent { background: var(--body-background-fill); }
#view .nothing { display: grid; place-items: center; min-height: 360px; border-radius: 8px;
  border: 1px dashed #8888; opacity: .7; }
#view .first { display: block; width: 100%; max-height: 70vh; object-fit: contain; border-radius: 8px; }
"""
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
KEPT_SECONDS = 24 * 3600  # of uploads
AUTO = {"tile": "auto"}  # where the form suggests something else than the command


@contextmanager
def served(
    models: Sequence[str], clips: Sequence[Path], options: Sequence[str], host: str, port: int
) -> Iterator[str]:
    """Serves the page until the end of the `with`; gives its address.

    What is uploaded and made lies in a temporary folder that is removed then. clips: samples beside the one
    drawn here; options: as of Desk. UserError for an address that cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="flashvsr-app-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ |= QUIET | {"GRADIO_TEMP_DIR": str(folder / "uploads")}
        import gradio as gr

        import flashvsr.streaming.upscaler  # noqa: F401  brings torch: now, not in the first job

        (folder / "results").mkdir()
        samples = [sample.write(folder / "sample.mp4"), *clips]
        desk = Desk(folder / "results", options)
        page = build(desk, models, [str(path) for path in samples])
        fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
        allowed = [str(folder / "results"), *map(str, samples)]
        try:
            _, address, _ = page.launch(
                server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False,
                ssr_mode=False, pwa=False, mcp_server=False, run_history=False, enable_monitoring=False,
                show_error=True, inbrowser=False, footer_links=[], allowed_paths=allowed,
                theme=gr.themes.Default(primary_hue="blue", **fonts), css=STYLE, head=compare.SCRIPT,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"{host}:{port} cannot be served ({error}); try another --port") from None
        try:
            yield address
        finally:
            desk.close()
            page.close(verbose=False)


def build(desk: Desk, models: Sequence[str], samples: Sequence[str]) -> Any:
    """The page as gradio's Blocks, with its queue: one job at a time."""
    import gradio as gr

    with gr.Blocks(
        title="FlashVSR", analytics_enabled=False, delete_cache=(KEPT_SECONDS // 24, KEPT_SECONDS)
    ) as page:
        gr.Markdown(f"# FlashVSR\n{HELP}")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                clip = gr.File(label="Clip", file_types=sorted(VIDEO_SUFFIXES), height=140)
                choices = [(Path(path).name, path) for path in samples]
                chosen = gr.Dropdown(choices, value=None, label="or a sample")
                form = {
                    "model": gr.Dropdown(
                        list(models), value=models[0], label="Model", visible=len(models) > 1
                    ),
                    "scale": gr.Number(DEFAULTS["scale"], label="Scale", minimum=1),
                }
                with gr.Row():
                    start = gr.Button("Upscale", variant="primary")
                    cancel = gr.Button("Cancel")
                with gr.Accordion("Settings", open=False):
                    form |= _settings(gr)
            with gr.Column(scale=5, min_width=480):
                view = gr.HTML(NOTHING, elem_id="view", padding=False)
                said = gr.Markdown(elem_id="said")
        fields = list(form.values())

        def filled(values: Sequence[Any]) -> dict[str, Any]:
            return dict(zip(form, values, strict=True))

        def refused(text: str) -> Exception:
            return gr.Error(text, duration=None, print_exception=False)

        def describe(path: str | None, *values: Any) -> tuple[str, str]:
            if not path:
                return NOTHING, ""
            try:
                text, first = desk.describe(path, filled(values))
            except (UserError, OSError) as error:
                raise refused(sentence(error)) from None
            return f'<img class="first" src="{_jpeg(first)}" alt="first frame">', text

        # gradio fills in the first two by their kind, and knows neither after *values.
        def upscale(request: gr.Request, progress: Any = gr.Progress(), *values: Any) -> tuple[str, str]:  # noqa: B008
            def tell(done: int, total: int | None, text: str) -> None:
                progress(done / total if total else 0, desc=text)

            path, *values = values
            if not path:
                raise refused("no clip: choose a file or a sample")
            try:
                result = desk.run(request.session_hash, path, filled(values), tell)
            except Cancelled:
                raise refused("stopped") from None
            except (UserError, OSError) as error:
                raise refused(sentence(error)) from None
            except Exception as error:
                traceback.print_exc()
                text = f"a fault of this program, {type(error).__name__}: {error}; its console says more"
                raise refused(text) from None
            return _compared(result), f"{result.sentence}\n\n`{result.command}`"

        def stop(request: gr.Request) -> str:
            return "Stopped." if desk.stop(request.session_hash) else gr.skip()

        def leave(request: gr.Request) -> None:
            desk.leave(request.session_hash)

        private = {"api_visibility": "private"}
        chosen.input(lambda path: path, chosen, clip, show_progress="hidden", **private)
        clip.change(describe, [clip, *fields], [view, said], show_progress="hidden", **private)
        job = start.click(
            upscale, [clip, *fields], [view, said], api_name="upscale", concurrency_id="device",
            concurrency_limit=1, show_progress_on=said,
        )  # fmt: skip
        cancel.click(stop, None, said, queue=False, cancels=job, show_progress="hidden", **private)
        page.unload(leave)
    return page


def _settings(gr: Any) -> dict[str, Any]:
    """What most people leave alone: components by the name of their option."""

    def value(name: str) -> Any:
        return AUTO.get(name, DEFAULTS[name])

    def text(name: str, label: str, info: str) -> Any:
        given = value(name)
        return gr.Textbox("" if given is None else str(given), label=label, info=info, max_lines=1)

    return {
        "decoder": gr.Radio(["auto", "tc", "vae"], value=value("decoder"), label="Decoder",
                            info="auto takes tc, the fast one, where the model has it"),
        "color-fix": gr.Radio(["adain", "wavelet", "none"], value=value("color-fix"), label="Colour fix"),
        "seed": gr.Number(value("seed"), label="Seed", precision=0, minimum=0),
        "sparse-ratio": text("sparse-ratio", "Sparse ratio", "of blocks attended to; empty: as trained"),
        "local-range": text("local-range", "Local range", "block rows and columns seen; none: all"),
        "kv-chunks": gr.Number(value("kv-chunks"), label="Chunks remembered", precision=0, minimum=2),
        "tile": text("tile", "Tile", "LR pixels; auto: as the memory allows; empty: never"),
        "overlap": gr.Number(value("overlap"), label="Overlap of tiles", precision=0, minimum=0),
        "memory": text("memory", "Memory", "GiB to take at most; empty: 0.9 of what is free"),
        "offload": gr.Checkbox(value("offload"), label="Keep on the GPU only the part at work"),
        "start": text("start", "From", "12.5 or 0:12.5 (seconds), or 300f (frames)"),
        "end": text("end", "To", "the same; empty: the end"),
        "crf": gr.Number(value("crf"), label="CRF", info="lower: better and larger", minimum=0),
        "no-audio": gr.Checkbox(value("no-audio"), label="Leave out the sound"),
    }  # fmt: skip


def _jpeg(picture: np.ndarray) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "jpeg", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _compared(result: Result) -> str:
    def url(path: Path) -> str:
        return escape("gradio_api/file=" + quote(str(path)))

    return (
        f'<video-compare before="{url(result.before)}" after="{url(result.out)}" width="{result.width}" '
        f'height="{result.height}" name="{escape(result.out.name)}"></video-compare>'
    )
