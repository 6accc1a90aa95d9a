
// Draw every chart from the specification beside it, and keep it as wide as the page.
const config = JSON.parse(document.getElementById("chart-config").textContent);
for (const element of document.querySelectorAll("script.spec")) {
  const target = document.getElementById(element.dataset.chart);
  const options = { actions: false, renderer: "svg", config };
  vegaEmbed(target, JSON.parse(element.textContent), options)
    .then(() => { target.dataset.drawn = "yes"; })
    .catch((error) => { target.textContent = `This chart cannot be drawn: ${error}`; });
}
