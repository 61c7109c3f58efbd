"use strict";
(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const one = (selector) => document.querySelector(selector);
  document.documentElement.classList.add("script");

  // Tips: the marks' own titles would come late and beside ours.
  const tip = one("#tip");
  const place = (x, y) => {
    tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${y + 18 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 12 : y + 18}px`;
  };
  const show = (mark, x, y) => { tip.textContent = mark.dataset.tip; tip.hidden = false; place(x, y); };
  const hide = () => { tip.hidden = true; };
  for (const mark of all("[data-tip]")) {
    mark.querySelector("title")?.remove();
    mark.addEventListener("pointerenter", (event) => show(mark, event.clientX, event.clientY));
    mark.addEventListener("pointermove", (event) => place(event.clientX, event.clientY));
    mark.addEventListener("pointerleave", hide);
    mark.addEventListener("focus", () => { const box = mark.getBoundingClientRect(); show(mark, box.right, box.top); });
    mark.addEventListener("blur", hide);
  }

  // Methods and full models that are switched off, in every chart and list at once.
  const off = { method: new Set(), teacher: new Set() };
  for (const chip of all("[data-hide]")) {
    chip.addEventListener("click", () => {
      const { hide: kind, value } = chip.dataset;
      const pressed = chip.getAttribute("aria-pressed") !== "true";
      chip.setAttribute("aria-pressed", String(pressed));
      if (pressed) off[kind].delete(value); else off[kind].add(value);
      for (const shown of all("[data-method]")) {
        shown.classList.toggle("hidden", off.method.has(shown.dataset.method) || off.teacher.has(shown.dataset.teacher));
      }
    });
  }

  one("#only-different")?.addEventListener("change", (event) => {
    one("#samples").classList.toggle("only-different", event.target.checked);
  });

  // The guideline's calculator: sliders run over the logarithm of the fitted range.
  const data = one("#guidelines");
  if (!data) return;
  const guidelines = JSON.parse(data.textContent);
  const [method, size, kept] = ["#g-method", "#g-size", "#g-kept"].map(one);
  const between = ([low, high], slider) => low * Math.pow(high / low, slider.value / 1000);
  const short = (value) => {
    const unit = [[1e9, " G"], [1e6, " M"], [1e3, " k"]].find(([scale]) => value >= scale) ?? [1, ""];
    return `${(value / unit[0]).toPrecision(3)}${unit[1]}`;
  };
  const time = (value) => (value >= 1 ? `${value.toFixed(2)} s` : `${(1000 * value).toPrecision(3)} ms`);
  const update = () => {
    const chosen = guidelines[method.value];
    const parameters = between(chosen.parameters, size), share = between(chosen.kept, kept);
    const { quality, tpot_s: tpot } = chosen.fits;
    const said = [];
    if (quality) {
      const logit = quality.constant + (quality.ln_p ?? 0) * Math.log(parameters) + quality.ln_k * Math.log(share);
      said.push(`quality ${(100 / (1 + Math.exp(-logit))).toFixed(1)} ± ${(100 * quality.error).toFixed(1)} %`);
    }
    if (tpot) {
      said.push(`TPOT ${time(tpot.constant + tpot.p_k * parameters * share)} ± ${(100 * tpot.error).toFixed(0)} %`);
    }
    one("#g-size-out").textContent = short(parameters);
    one("#g-kept-out").textContent = `${(100 * share).toFixed(1)} %`;
    one("#g-result").textContent = said.length ? said.join(", ") : "this fit is of no use: see its errors below";
    size.disabled = chosen.parameters[0] === chosen.parameters[1];
  };
  for (const control of [method, size, kept]) control.addEventListener("input", update);
  one("#calculator").hidden = false;
  update();
})();
