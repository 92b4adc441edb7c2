// Marking a box on the picture of the demo page. The question is the only state: dragging over the picture writes
// {<x0><y0><x1><y1>} (0..100 of its width and height) into the question, and the frame shows the question's box.
() => {
  const BOX = /\s*\{<(\d{1,3})><(\d{1,3})><(\d{1,3})><(\d{1,3})>\}/;
  const image = () => document.querySelector("#picture img");
  const question = () => document.querySelector("#question textarea, #question input");
  const frame = document.createElement("div");
  frame.id = "marked";
  let start = null;

  // The picture inside of its element, which it fills in one direction only (object-fit: contain).
  const area = () => {
    const outer = image().getBoundingClientRect();
    const scale = Math.min(outer.width / image().naturalWidth, outer.height / image().naturalHeight);
    const width = image().naturalWidth * scale, height = image().naturalHeight * scale;
    return {left: outer.left + (outer.width - width) / 2, top: outer.top + (outer.height - height) / 2, width, height};
  };
  const percent = (position, from, length) =>
    Math.round(100 * Math.min(1, Math.max(0, (position - from) / length)));
  const point = event => {
    const inside = area();
    return [percent(event.clientX, inside.left, inside.width), percent(event.clientY, inside.top, inside.height)];
  };
  const between = (a, b) => [0, 1].map(i => Math.min(a[i], b[i])).concat([0, 1].map(i => Math.max(a[i], b[i])));

  const draw = box => {
    if (!box || !image() || !image().naturalWidth) return frame.remove();
    const parent = image().parentElement, origin = parent.getBoundingClientRect(), inside = area();
    parent.style.position = "relative";
    Object.assign(frame.style, {
      left: `${inside.left - origin.left + inside.width * box[0] / 100}px`,
      top: `${inside.top - origin.top + inside.height * box[1] / 100}px`,
      width: `${inside.width * (box[2] - box[0]) / 100}px`,
      height: `${inside.height * (box[3] - box[1]) / 100}px`,
    });
    parent.append(frame);
  };
  const show = text => {
    const found = BOX.exec(text || "");
    draw(found && found.slice(1).map(Number));
  };
  const write = box => {
    const text = question().value, mark = box ? ` {<${box.join("><")}>}` : "";
    question().value = BOX.test(text) ? text.replace(BOX, mark) : text.trimEnd() + mark;
    question().dispatchEvent(new Event("input", {bubbles: true}));
    show(question().value);
  };

  document.addEventListener("pointerdown", event => {
    if (event.target !== image() || event.button !== 0) return;
    event.preventDefault();
    image().setPointerCapture(event.pointerId);
    start = point(event);
  });
  document.addEventListener("pointermove", event => start && image() && draw(between(start, point(event))));
  document.addEventListener("pointerup", event => {
    if (!start || !image()) return;
    const box = between(start, point(event));
    start = null;
    write(box[0] < box[2] && box[1] < box[3] ? box : null); // a click takes the mark away
  });
  document.addEventListener("pointercancel", () => { start = null; show(question().value); });
  document.addEventListener("dragstart", event => event.target === image() && event.preventDefault());
  document.addEventListener("load", event => event.target === image() && show(question().value), true);
  window.addEventListener("resize", () => show(question().value));
  window.showMarkedBox = show;
}
