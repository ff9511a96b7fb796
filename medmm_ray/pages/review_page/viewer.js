// The image: zoom at the pointer, pan, window and level. Grey value v is shown as (v - level + width / 2) / width.
function makeViewer(find) {
  const FULL = { name: "Full", width: 255, level: 127.5 };
  const PRESETS = [
    FULL,
    { name: "Dark parts", width: 130, level: 75 },
    { name: "Bright parts", width: 120, level: 180 },
    { name: "Contrast", width: 110, level: 127.5 },
    { name: "Inverted", width: -255, level: 127.5 },
  ];
  const MOST_ZOOM = 40;
  const stage = find("stage"), picture = find("picture"), strip = find("strip"), presets = find("presets");
  const channels = stage.querySelectorAll("feFuncR, feFuncG, feFuncB");
  const kept = new Map();
  let pictures = [], chosen = 0, x = 0, y = 0, zoom = 1, fit = 1, preset = 0, width = FULL.width, level = FULL.level;

  function place() {
    picture.style.transform = "translate(" + x + "px," + y + "px) scale(" + zoom + ")";
    tell();
  }
  function tell() {
    find("reading").textContent =
      Math.round((zoom / fit) * 100) + " %   W " + Math.round(Math.abs(width)) + "  L " + Math.round(level) +
      (width < 0 ? "  inverted" : "");
  }
  function reset() {
    const box = stage.getBoundingClientRect();
    if (!picture.naturalWidth || !box.width) return;
    fit = zoom = Math.min(box.width / picture.naturalWidth, box.height / picture.naturalHeight);
    x = (box.width - picture.naturalWidth * zoom) / 2;
    y = (box.height - picture.naturalHeight * zoom) / 2;
    place();
  }
  function zoomBy(factor, at) {
    const box = stage.getBoundingClientRect();
    const px = at ? at.clientX - box.left : box.width / 2, py = at ? at.clientY - box.top : box.height / 2;
    const next = Math.min(Math.max(zoom * factor, fit / 2), fit * MOST_ZOOM);
    x = px - ((px - x) * next) / zoom;
    y = py - ((py - y) * next) / zoom;
    zoom = next;
    place();
  }
  function setWindow(newWidth, newLevel) {
    const sign = newWidth < 0 ? -1 : 1;
    width = sign * Math.min(Math.max(Math.abs(newWidth), 4), 510);
    level = Math.min(Math.max(newLevel, 0), 255);
    for (const channel of channels) {
      channel.setAttribute("slope", 255 / width);
      channel.setAttribute("intercept", 0.5 - level / width);
    }
    tell();
  }
  function setPreset(number) {
    preset = (number + PRESETS.length) % PRESETS.length;
    setWindow(PRESETS[preset].width, PRESETS[preset].level);
    markPreset(preset);
  }
  function markPreset(number) {
    [...presets.children].forEach((button, i) => button.setAttribute("aria-pressed", i === number));
  }
  function fetched(id) {
    if (!kept.has(id)) {
      const image = new Image();
      image.src = "/picture/" + encodeURIComponent(id);
      kept.set(id, image);
      if (kept.size > 24) kept.delete(kept.keys().next().value);
    }
    return kept.get(id);
  }
  function choose(number) {
    if (!pictures.length) return;
    chosen = (number + pictures.length) % pictures.length;
    const { image_id, role, caption } = pictures[chosen];
    find("caption").textContent =
      role === "query" ? (pictures.length > 1 ? "This patient" : "") : "Similar case: " + caption;
    stage.classList.toggle("reference", role !== "query");
    [...strip.children].forEach((item, i) => item.setAttribute("aria-selected", i === chosen));
    if (picture.dataset.id === image_id) return;
    picture.dataset.id = image_id;
    find("picture-fault").hidden = true;
    picture.src = fetched(image_id).src;
  }
  function show(list) {
    const same = list.map((p) => p.image_id).join() === pictures.map((p) => p.image_id).join();
    pictures = list;
    if (same) return choose(chosen);
    strip.replaceChildren(
      ...list.map((item, i) => {
        const button = document.createElement("button");
        button.setAttribute("role", "option");
        button.title = item.role === "query" ? "this patient" : "similar case: " + item.caption;
        button.className = item.role;
        const small = fetched(item.image_id).cloneNode();
        small.alt = button.title;
        button.append(small);
        button.onclick = () => choose(i);
        return button;
      }),
    );
    strip.hidden = list.length < 2;
    picture.hidden = !list.length;
    find("caption").textContent = list.length ? "" : "This question has no image.";
    delete picture.dataset.id;
    setPreset(0);
    choose(0);
  }

  picture.onload = reset;
  picture.onerror = () => {
    find("picture-fault").hidden = false;
    find("picture-fault").textContent = "This picture cannot be read.";
  };
  new ResizeObserver(reset).observe(stage);
  stage.oncontextmenu = (event) => event.preventDefault();
  stage.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoomBy(Math.exp(-event.deltaY / 500), event);
  }, { passive: false });
  stage.ondblclick = reset;
  stage.onpointerdown = (event) => {
    stage.setPointerCapture(event.pointerId);
    const windows = event.button === 2 || event.shiftKey;
    const start = { x: event.clientX, y: event.clientY, px: x, py: y, width, level };
    if (windows) markPreset(-1);
    stage.onpointermove = (move) => {
      const dx = move.clientX - start.x, dy = move.clientY - start.y;
      if (windows) {
        setWindow(start.width + dx * 0.7 * Math.sign(start.width), start.level + dy * 0.5);
      } else {
        x = start.px + dx;
        y = start.py + dy;
        place();
      }
    };
    stage.onpointerup = stage.onpointercancel = () => (stage.onpointermove = null);
  };
  presets.replaceChildren(
    ...PRESETS.map((item, i) => {
      const button = document.createElement("button");
      button.textContent = item.name;
      button.onclick = () => setPreset(i);
      return button;
    }),
  );
  return {
    show,
    prefetch: (ids) => ids.forEach(fetched),
    reset() { reset(); setPreset(0); },
    zoomIn: () => zoomBy(1.25),
    zoomOut: () => zoomBy(0.8),
    nextPreset: () => setPreset(preset + 1),
    invert() { setWindow(-width, level); markPreset(-1); },
    next: (by) => choose(chosen + by),
  };
}
