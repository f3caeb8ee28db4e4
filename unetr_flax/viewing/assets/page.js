"use strict";
(async () => {
  const element = (id) => document.getElementById(id);
  const message = element("message");
  const fail = (error) => {
    message.textContent = `The scan cannot be shown: ${error.message || error}`;
  };
  const data = JSON.parse(element("data").textContent);
  element("title").textContent = data.title;
  for (const note of data.notes) {
    element("notes").appendChild(document.createElement("li")).textContent = note;
  }
  if (!document.createElement("canvas").getContext("webgl2")) {
    fail("this browser has no WebGL 2");
    return;
  }
  try {
    const viewer = new niivue.Niivue({
      isRadiologicalConvention: true,
      sagittalNoseLeft: true,
      isOrientationTextVisible: true,
      showAllOrientationMarkers: true,
      multiplanarShowRender: niivue.SHOW_RENDER.ALWAYS,
      multiplanarLayout: niivue.MULTIPLANAR_TYPE.GRID,
      backColor: [0, 0, 0, 1],
      crosshairColor: [1, 0.85, 0.2, 0.7],
      crosshairWidth: 0.25,
      crosshairWidthUnit: "percent",
      fontColor: [1, 1, 1, 1],
      fontMinPx: 14,
      multiplanarPadPixels: 6,
      dragAndDropEnabled: false,
      loadingText: "",
      logLevel: "error",
    });
    await viewer.attachToCanvas(element("canvas"));
    const load = (id, options) =>
      niivue.NVImage.loadFromBase64({
        base64: element(id).textContent,
        name: `${id}.nii.gz`,
        ...options,
      });
    const [low, high] = data.presets[0].window;
    const image = await load("image", { colormap: "gray", cal_min: low, cal_max: high });
    viewer.addVolume(image);
    let labels = null;
    let allLabels = null;
    if (data.labels.length) {
      labels = await load("labels", { opacity: data.opacity });
      allLabels = labels.img.slice();
      colorLabels();
      viewer.addVolume(labels);
    }

    // The values of the label map are 1 for the first label, and so on.
    function colorLabels() {
      const column = (i) => [0, ...data.labels.map((label) => label.color[i])];
      labels.setColormapLabel({
        R: column(0),
        G: column(1),
        B: column(2),
        A: [0, ...data.labels.map(() => 255)],
        I: [...Array(data.labels.length + 1).keys()],
      });
    }

    const size = image.dimsRAS.slice(1, 4);
    function goTo(voxel) {
      viewer.scene.crosshairPos = viewer.vox2frac(voxel);
      viewer.createOnLocationChange();
      viewer.drawScene();
    }
    // The voxel that holds the center of a voxel of the scan, whose grid may be finer.
    const onPage = (voxel) =>
      voxel.map((i, axis) =>
        Math.min(size[axis] - 1, Math.floor(((i + 0.5) * size[axis]) / data.shape[axis])),
      );
    const position = () => [0, 1, 2].map((axis) => Number(element(`slice${axis}`).value));
    for (const axis of [0, 1, 2]) {
      const slider = element(`slice${axis}`);
      slider.max = size[axis] - 1;
      slider.addEventListener("input", () => goTo(position()));
    }

    const number = (value) => Number(value.toPrecision(5)).toString();
    viewer.onLocationChange = (location) => {
      const voxel = Array.from(location.vox).slice(0, 3).map(Math.round);
      for (const axis of [0, 1, 2]) {
        element(`slice${axis}`).value = voxel[axis];
        element(`number${axis}`).value = `${voxel[axis] + 1} of ${size[axis]}`;
      }
      const [intensity, value] = location.values.map((item) => item.value);
      const label = data.labels[Math.round(value || 0) - 1];
      const mm = Array.from(location.mm).slice(0, 3);
      element("readout").textContent =
        `${mm.map((x) => x.toFixed(1)).join(", ")} mm: intensity ${number(intensity)}` +
        (label ? `, ${label.name}` : "");
    };

    element("view").addEventListener("change", (event) => {
      viewer.setSliceType(Number(event.target.value));
    });

    function showWindow() {
      element("low").value = number(image.cal_min);
      element("high").value = number(image.cal_max);
      const chosen = data.presets.findIndex(
        ({ window: [a, b] }) => a === image.cal_min && b === image.cal_max,
      );
      element("preset").value = chosen < 0 ? "" : chosen;
    }
    function setWindow(from, to) {
      if (!(from < to)) {
        showWindow();
        return;
      }
      image.cal_min = from;
      image.cal_max = to;
      viewer.updateGLVolume();
      showWindow();
    }
    data.presets.forEach(({ name }, i) => {
      element("preset").add(new Option(name, i));
    });
    const other = new Option("Other", "");
    other.disabled = true;
    element("preset").add(other);
    element("preset").addEventListener("change", (event) => {
      setWindow(...data.presets[event.target.value].window);
    });
    for (const id of ["low", "high"]) {
      element(id).addEventListener("change", () => {
        setWindow(element("low").valueAsNumber, element("high").valueAsNumber);
      });
    }
    viewer.onIntensityChange = showWindow;
    showWindow();

    if (labels) {
      const setOpacity = () => {
        const opacity = element("opacity").valueAsNumber;
        element("percent").value = `${Math.round(100 * opacity)} %`;
        viewer.setOpacity(1, opacity);
      };
      element("opacity").value = data.opacity;
      element("opacity").addEventListener("input", setOpacity);
      setOpacity();
      const setOutline = () => viewer.setAtlasOutline(element("outline").checked ? 1 : 0);
      element("outline").addEventListener("change", setOutline);
      setOutline();
      const boxes = data.labels.map(addLegendEntry);
      element("all").addEventListener("change", (event) => {
        data.labels.forEach((label, i) => {
          label.hidden = !event.target.checked;
          boxes[i].checked = event.target.checked;
        });
        showLabels();
      });
      function showLabels() {
        const hidden = data.labels.filter((label) => label.hidden).length;
        element("all").checked = hidden === 0;
        element("all").indeterminate = hidden > 0 && hidden < data.labels.length;
        // A hidden label becomes background, as a transparent one would keep its outline.
        const values = Uint16Array.of(0, ...data.labels.map(({ hidden }, i) => (hidden ? 0 : i + 1)));
        for (let i = 0; i < allLabels.length; i++) labels.img[i] = values[allLabels[i]];
        viewer.updateGLVolume();
      }
      function addLegendEntry(label) {
        const entry = element("legend").appendChild(document.createElement("li"));
        const box = entry.appendChild(document.createElement("input"));
        box.type = "checkbox";
        box.checked = true;
        box.setAttribute("aria-label", `Show ${label.name}`);
        box.addEventListener("change", () => {
          label.hidden = !box.checked;
          showLabels();
        });
        const swatch = entry.appendChild(document.createElement("span"));
        swatch.className = "swatch";
        swatch.style.background = `rgb(${label.color.join(",")})`;
        const name = entry.appendChild(document.createElement("button"));
        name.type = "button";
        name.title = "Go to its largest slices";
        name.textContent = label.name;
        name.addEventListener("click", () => goTo(onPage(label.voxel)));
        const volume = entry.appendChild(document.createElement("span"));
        volume.className = "size";
        volume.textContent = `${label.ml.toFixed(1)} ml`;
        return box;
      }
    } else {
      element("overlay").textContent = "No labels found";
    }
    viewer.setRenderAzimuthElevation(205, 15);
    goTo(onPage(data.start));
    message.textContent = "";
    document.body.dataset.ready = "true";
  } catch (error) {
    fail(error);
    throw error;
  }
})();
