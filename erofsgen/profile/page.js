"use strict";
// Zoom, filter, order and what is under the pointer. All of the picture is in the page without it. Text that comes from
// an image is only ever taken from the page and put back as text.
(() => {
  const data = JSON.parse(document.getElementById("marks").textContent);
  const [tools, find, order, waitedOnly, shown, axis, picture, tip] =
    ["tools", "find", "order", "waited", "shown", "axis", "rows", "tip"].map((id) => document.getElementById(id));
  const timed = [...document.querySelectorAll("svg.timed")];
  const names = [...document.querySelectorAll(".name")];
  const bars = [...picture.querySelectorAll("g")];
  const paths = names.map((name) => name.querySelector(".path").textContent.toLowerCase());
  let from = 0, to = data.end, visible = names.map((_, number) => number);

  const rounded = (value) => value >= 100 ? value.toFixed(0) : value >= 1 ? value.toFixed(1) : value.toFixed(3);
  const time = (ms) => ms >= 10000 ? `${(ms / 1000).toFixed(1)} s` : `${rounded(ms)} ms`;
  const size = (bytes) => {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = 0;
    for (; bytes >= 1023.95 && unit < units.length - 1; unit++) bytes /= 1024;
    return `${unit ? bytes.toFixed(1) : bytes} ${units[unit]}`;
  };

  const digits = (step) => Math.max(0, -Math.floor(Math.log10(step) + 1e-9));

  function drawAxis() {
    const rough = (to - from) / 8;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
    axis.replaceChildren();
    for (let number = Math.ceil(from / step); number * step < to; number++) {
      const at = number * step;
      const label = document.createElement("span");
      label.textContent = to >= 10000 ? `${(at / 1000).toFixed(digits(step / 1000))} s` : `${at.toFixed(digits(step))} ms`;
      label.style.left = `${100 * (at - from) / (to - from)}%`;
      axis.append(label);
    }
  }

  function zoom(start, end) {
    const width = Math.min(Math.max(end - start, data.end / 100000, 0.01), data.end);
    from = Math.min(Math.max(start, 0), data.end - width);
    to = from + width;
    for (const svg of timed) svg.setAttribute("viewBox", `${from} 0 ${width} ${svg.dataset.height}`);
    drawAxis();
  }

  function arrange() {
    const wanted = find.value.toLowerCase();
    const key = { first: null, waited: data.waited, bytes: data.bytes }[order.value];
    visible = names.map((_, number) => number).filter(
      (number) => paths[number].includes(wanted) && (!waitedOnly.checked || data.waited[number] > 0));
    if (key) visible.sort((a, b) => key[b] - key[a] || a - b);
    for (const name of names) name.hidden = true;
    for (const bar of bars) bar.setAttribute("hidden", "");
    visible.forEach((number, place) => {
      names[number].hidden = false;
      names[number].style.order = place;
      bars[number].removeAttribute("hidden");
      bars[number].setAttribute("transform", `translate(0 ${place * data.row})`);
    });
    const height = Math.max(visible.length, 1) * data.row;
    picture.dataset.height = height;
    picture.style.height = `${height}px`;
    shown.textContent = `${visible.length} of ${names.length} rows`;
    zoom(from, to);
  }

  function timeAt(event) {
    const box = axis.getBoundingClientRect();
    return from + Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * (to - from);
  }

  function say(event) {
    const box = picture.getBoundingClientRect();
    const number = visible[Math.floor((event.clientY - box.top) / data.row)];
    if (number === undefined) {
      tip.hidden = true;
      return;
    }
    const at = timeAt(event), near = 4 * (to - from) / box.width;
    let best = null, distance = near;
    for (const mark of data.marks[number]) {
      const away = Math.max(mark[0] - at, at - mark[0] - mark[1], 0);
      if (away <= distance) [best, distance] = [mark, away];
    }
    const lines = [names[number].querySelector(".path").textContent];
    if (best) {
      const waited = best[1] ? `waited ${time(best[1])}` : data.there;
      lines.push([`at ${time(best[0])}`, waited, size(best[2]), data.kinds[best[3]]].filter(Boolean).join(", "));
    } else {
      lines.push(`${data.marks[number].length} marks, ${size(data.bytes[number])}`);
    }
    tip.textContent = lines.join("\n");
    tip.hidden = false;
    tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8)}px`;
  }

  let begin = null;
  const span = document.createElement("div");
  span.id = "span";
  for (const plot of document.querySelectorAll(".plot")) {
    plot.addEventListener("mousedown", (event) => {
      if (event.button) return;
      begin = timeAt(event);
      span.style.width = "0";
      plot.append(span);
      event.preventDefault();
    });
    plot.addEventListener("dblclick", () => zoom(0, data.end));
    plot.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return;
      event.preventDefault();
      const at = timeAt(event), factor = event.deltaY > 0 ? 1.25 : 0.8;
      zoom(at - (at - from) * factor, at + (to - at) * factor);
    }, { passive: false });
  }
  window.addEventListener("mousemove", (event) => {
    if (begin === null) return;
    const [left, right] = [begin, timeAt(event)].sort((a, b) => a - b).map((at) => 100 * (at - from) / (to - from));
    span.style.left = `${left}%`;
    span.style.width = `${right - left}%`;
  });
  window.addEventListener("mouseup", (event) => {
    if (begin === null) return;
    const ends = [begin, timeAt(event)].sort((a, b) => a - b);
    begin = null;
    span.remove();
    if (ends[1] - ends[0] > (to - from) / 200) zoom(...ends);
  });
  picture.addEventListener("mousemove", say);
  picture.addEventListener("mouseleave", () => { tip.hidden = true; });
  for (const control of [find, order, waitedOnly]) control.addEventListener("input", arrange);
  document.getElementById("all").addEventListener("click", () => zoom(0, data.end));
  tools.hidden = false;
  arrange();
})();
