"use strict";
// ---- charts in the colors of the theme
const dark = matchMedia("(prefers-color-scheme: dark)");
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function drawChart(place) {
  const spec = JSON.parse(document.getElementById(place.id + "-spec").textContent);
  const layout = spec.layout;
  layout.font = { family: "system-ui, sans-serif", size: 11, color: color("--soft") };
  layout.paper_bgcolor = layout.plot_bgcolor = "rgba(0,0,0,0)";
  layout.margin = { l: 44, r: 18, t: 8, b: 36 };
  layout.legend = { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)", traceorder: "normal" };
  layout.hoverlabel = { bgcolor: color("--card"), bordercolor: color("--line"), font: { color: color("--ink") } };
  layout.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
  for (const name of Object.keys(layout).filter((key) => /^[xy]axis/.test(key)))
    Object.assign(layout[name], { title: { ...layout[name].title, font: { size: 11 } }, gridcolor: color("--grid"), zerolinecolor: color("--grid"), linecolor: color("--line") });
  return Plotly.react(place, spec.data, layout, { displayModeBar: false, responsive: true });
}
const drawCharts = () => Promise.all([...document.querySelectorAll(".chart")].map(drawChart));
dark.addEventListener("change", drawCharts);

// ---- how long ago the page was written
function age(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return `${Math.round(seconds / 3600)} h ago`;
}
function tellAge() {
  for (const place of document.querySelectorAll("[data-written]")) {
    const seconds = Date.now() / 1000 - Number(place.dataset.written);
    place.textContent = `(${age(seconds)})`;
    const warning = document.getElementById("silent");
    if (warning) warning.hidden = seconds < Number(warning.dataset.after);
  }
}
tellAge();
setInterval(tellAge, 5000);

// ---- videos show their poster and a button until they play, so that controls hide nothing
for (const screen of document.querySelectorAll(".screen")) {
  const video = screen.querySelector("video");
  const button = Object.assign(document.createElement("button"), { className: "play", ariaLabel: "play" });
  video.controls = false;
  button.addEventListener("click", () => video.play());
  video.addEventListener("play", () => { video.controls = true; button.remove(); });
  screen.append(button);
}
for (const link of document.querySelectorAll("a[data-video]"))
  link.addEventListener("click", () => document.getElementById(link.dataset.video).querySelector("video").play());

// ---- while the run goes on: a new version now and then, at the same place, and never while a video plays
const wait = Number(document.body.dataset.reload || 0);
const key = "solovla-scroll " + location.pathname;
function restorePlace() {
  try {
    const place = sessionStorage.getItem(key);
    sessionStorage.removeItem(key);
    if (place !== null) scrollTo(0, Number(place));
  } catch { /* the browser keeps nothing for files */ }
}
function reloadUnlessBusy() {
  const playing = [...document.querySelectorAll("video")].some((video) => !video.paused);
  if (playing || document.hidden) return;
  try { sessionStorage.setItem(key, String(scrollY)); } catch { /* the same */ }
  location.reload();
}
if (wait) setInterval(reloadUnlessBusy, wait * 1000);
drawCharts().then(() => { restorePlace(); document.body.dataset.drawn = "yes"; });
