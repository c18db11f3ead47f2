"""Two videos of the same moments in one place, parted by a divider that is dragged: an HTML element.

`<video-compare before=URL after=URL width=W height=H name=FILE>`: both URLs are files of this app, W and H
are of the larger video, over which the smaller one is stretched; FILE names the download. The browser plays
them; where it cannot, the element says so.
"""

SCRIPT = """<script>
customElements.define("video-compare", class extends HTMLElement {
  connectedCallback() {
    if (this.shadowRoot) return;
    const root = this.attachShadow({ mode: "open" }), [width, height] = [this.at("width"), this.at("height")];
    root.innerHTML = `<style>
      :host { display: block; --cut: 50%; --y: 50%; --zoom: 1; font: 14px/1.4 system-ui, sans-serif; }
      .stage { position: relative; overflow: hidden; margin: 0 auto; border-radius: 8px; background: #000;
        aspect-ratio: ${width} / ${height}; max-width: calc(70vh * ${width} / ${height}); }
      .stage:fullscreen { max-width: none; border-radius: 0; }
      video { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: fill;
        transform: scale(var(--zoom)); transform-origin: var(--cut) var(--y); }
      .stage:fullscreen video { object-fit: contain; }
      .side { position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--cut)) 0 0); }
      .line { position: absolute; inset: 0 auto 0 var(--cut); width: 2px; margin-left: -1px; background: #fff;
        box-shadow: 0 0 4px #000a; pointer-events: none; }
      .line::after { content: "↔"; position: absolute; top: 50%; left: 1px; translate: -50% -50%;
        width: 30px; height: 30px; border-radius: 50%; background: #fff; color: #222; text-align: center;
        font-size: 17px; line-height: 29px; box-shadow: 0 1px 5px #0008; }
      .cut { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0;
        cursor: ew-resize; appearance: none; touch-action: pan-y; }
      .cut::-webkit-slider-thumb { appearance: none; width: 1px; height: 100%; }
      .cut::-moz-range-thumb { width: 1px; height: 100%; border: 0; }
      .cut:focus-visible ~ .line::after { outline: 3px solid #4b8bbe; }
      b { position: absolute; top: 10px; padding: 1px 8px; border-radius: 4px; background: #000a; color: #fff;
        font-weight: 500; font-size: 12px; pointer-events: none; }
      .bar { display: flex; align-items: center; gap: 8px; margin-top: 8px; }
      .bar input { flex: 1; min-width: 60px; accent-color: #3b82f6; }
      button, a { font: inherit; color: inherit; background: none; border: 1px solid #8886;
        border-radius: 6px; min-width: 36px; height: 32px; line-height: 30px; padding: 0 8px;
        cursor: pointer; white-space: nowrap; }
      button[aria-pressed=true] { border-color: #3b82f6; color: #3b82f6; }
      a { background: #2563eb; border-color: #2563eb; color: #fff; text-decoration: none; padding: 0 14px; }
      output { font-variant-numeric: tabular-nums; white-space: nowrap; opacity: .75; }
      p { margin: 8px 0 0; color: #c0392b; }
    </style>
    <div class="stage"><video class="after" muted loop playsinline preload="auto"></video>
      <div class="side"><video class="before" muted loop playsinline preload="auto"></video></div>
      <input class="cut" type="range" min="0" max="100" step="0.1" value="50"
        aria-label="divider between input and output">
      <i class="line"></i><b style="left:10px">input</b><b style="right:10px">upscaled</b></div>
    <div class="bar"><button class="play" title="play or pause">▶</button>
      <input class="seek" type="range" min="0" max="1" step="0.001" value="0" aria-label="time">
      <output></output>
      <button class="zoom" title="enlarge around the divider">1×</button>
      <button class="sound" aria-pressed="false">sound</button>
      <button class="full">full screen</button>
      <a class="save" download>Download</a></div><p hidden></p>`;
    const find = name => root.querySelector(name), [after, before] = [find(".after"), find(".before")];
    this.after = after; this.before = before;
    for (const [video, name] of [[after, "after"], [before, "before"]]) {
      video.addEventListener("error", () => {
        find("p").hidden = false;
        find("p").textContent = "This browser cannot play the " + (name === "after" ? "result" : "input") +
          "; the download is not affected.";
      });
      video.src = this.getAttribute(name);
    }
    find(".save").href = this.getAttribute("after");
    find(".save").download = this.getAttribute("name");
    // The larger video leads; the other one is nudged towards it, and set where they are far apart.
    const clock = s => Math.floor(s / 60) + ":" + (s % 60).toFixed(1).padStart(4, "0");
    const follow = () => {
      const ahead = after.currentTime - before.currentTime;
      if (after.paused ? ahead !== 0 && !before.seeking : Math.abs(ahead) > 0.2)
        before.currentTime = after.currentTime;
      before.playbackRate = after.paused ? 1 : Math.min(Math.max(1 + 2 * ahead, 0.5), 2);
      if (after.duration && !after.seeking) find(".seek").value = after.currentTime / after.duration;
      find("output").textContent = clock(after.currentTime) + " / " + clock(after.duration || 0);
    };
    const tick = () => { if (this.isConnected) { follow(); requestAnimationFrame(tick); } };
    after.addEventListener("play", () => { before.play(); find(".play").textContent = "❚❚"; });
    after.addEventListener("pause", () => { before.pause(); find(".play").textContent = "▶"; });
    find(".play").onclick = () => after.paused ? after.play() : after.pause();
    find(".seek").oninput = e => { after.currentTime = e.target.value * after.duration; };
    find(".cut").oninput = e => this.style.setProperty("--cut", e.target.value + "%");
    find(".stage").onpointermove = e => {
      const box = find(".stage").getBoundingClientRect();
      this.style.setProperty("--y", 100 * (e.clientY - box.top) / box.height + "%");
    };
    let zoom = 1;
    find(".zoom").onclick = e => {
      zoom = zoom < 8 ? 2 * zoom : 1;
      this.style.setProperty("--zoom", zoom);
      e.target.textContent = zoom + "×";
    };
    find(".sound").onclick = e => {
      after.muted = !after.muted;
      e.target.ariaPressed = !after.muted;
    };
    find(".full").onclick = () => document.fullscreenElement ? document.exitFullscreen()
      : find(".stage").requestFullscreen();
    after.play().catch(() => {});
    tick();
  }
  at(name) { return Number(this.getAttribute(name)); }
});
</script>"""
