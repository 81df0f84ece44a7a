const button = document.createElement('button');
button.id = 'theme';
button.type = 'button';
button.textContent = 'light / dark';
button.onclick = () => {
  const root = document.documentElement, dark = matchMedia('(prefers-color-scheme:dark)').matches;
  root.dataset.theme = (root.dataset.theme || (dark ? 'dark' : 'light')) === 'dark' ? 'light' : 'dark';
};
document.body.prepend(button);
