// What the theme leaves out for readers without a mouse: wide tables that scroll can be focused,
// and the bibliography is not announced as a list that it is not marked up as.
window.addEventListener("DOMContentLoaded", () => {
  const wide = ".pst-scrollable-table-container, .cell_output .text_html, div.highlight pre, mjx-container[display='true'], [style*='overflow-x: auto']";
  document.querySelectorAll(wide).forEach((element) => { element.tabIndex = 0; });
  document.querySelectorAll(".citation-list[role='list']").forEach((list) => list.removeAttribute("role"));
});
