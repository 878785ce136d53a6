// SPDX-License-Identifier: Apache-2.0
// A small chart of the last minute: values at equal intervals, the newest at the right edge.

const SVG = "http://www.w3.org/2000/svg";
const POINTS = 60;
const HEIGHT = 36;

export class Chart {
  // top: the value at the upper edge, unless a value is higher. layers: how many values are stacked in each point.
  constructor(svg, { top, layers = 1 }) {
    this.top = top;
    this.points = [];
    svg.setAttribute("viewBox", `0 0 ${POINTS - 1} ${HEIGHT}`);
    svg.setAttribute("preserveAspectRatio", "none");
    this.layers = Array.from({ length: layers }, (_, layer) => {
      const area = svg.appendChild(document.createElementNS(SVG, "path"));
      const line = svg.appendChild(document.createElementNS(SVG, "path"));
      area.setAttribute("class", `area layer-${layer + 1}`);
      line.setAttribute("class", `line layer-${layer + 1}`);
      return { area, line };
    });
  }

  add(...values) {
    this.points = [...this.points, values].slice(-POINTS);
    const sums = this.points.map((point) => point.map((_, layer) => sum(point.slice(0, layer + 1))));
    const top = Math.max(this.top, ...sums.flat());
    this.layers.forEach(({ area, line }, layer) => {
      const first = POINTS - sums.length;
      const path = sums.map((point, index) => `${first + index} ${height(point[layer], top)}`).join("L");
      line.setAttribute("d", `M${path}`);
      area.setAttribute("d", `M${first} ${HEIGHT}L${path}V${HEIGHT}Z`);
    });
  }
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

// One unit of room above and below, for the line's own width.
function height(value, top) {
  return (HEIGHT - 1 - (value / top) * (HEIGHT - 2)).toFixed(2);
}
